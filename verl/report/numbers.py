# SPDX-License-Identifier: Apache-2.0
"""How pages and pictures write a number."""

from __future__ import annotations

import math

UNDEFINED = "undefined"
"""What is written in place of NaN."""


def number_text(number: float) -> str:
    """Three digits, and all before the point up to ten million: 0.0123, 27.1, 1,024."""
    if math.isnan(number):
        return UNDEFINED
    if 999.5 <= abs(number) < 1e7:
        return f"{number:,.0f}"
    return f"{number + 0.0:.3g}"  # -0.0 loses its sign


def correlation_text(number: float) -> str:
    """A correlation, with its sign and three decimals."""
    return UNDEFINED if math.isnan(number) else f"{number:+.3f}"
