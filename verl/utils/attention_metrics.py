# SPDX-License-Identifier: Apache-2.0
"""The kinds of keys that a response token can attend to."""

from __future__ import annotations

from enum import IntEnum


class KeyKind(IntEnum):
    """What a position of a sequence is to the queries of its response."""

    PADDING = 0
    SINK = 1
    TEXT = 2
    VISION = 3
    PROMPT = 4
    RESPONSE = 5
