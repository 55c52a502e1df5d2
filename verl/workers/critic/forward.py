# SPDX-License-Identifier: Apache-2.0
"""A critic's stream for response tokens: the value before each token.

Shapes: L response tokens of all rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from verl.models.token_layout import TokenLayout
from verl.protocol import DataProto
from verl.utils.logprobs import LazyLogits
from verl.workers.response_forward import ResponseForward


class ValueForward(ResponseForward):
    """The stream `values`: before each response token, the expected sum of the rewards from that token on."""

    head_streams = ("values",)

    def _head(
        self, rows: DataProto, layout: TokenLayout, inputs: dict[str, Any], names: Sequence[str]
    ) -> Callable[[LazyLogits], torch.Tensor]:
        return lambda values: values.states  # (L, 1)
