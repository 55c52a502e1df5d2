# SPDX-License-Identifier: Apache-2.0
"""How pages and pictures write a number."""

from __future__ import annotations

import math


def number_text(number: float) -> str:
    """Three digits, and all before the point up to ten million: 0.0123, 27.1, 1,024. NaN is `undefined`."""
    if math.isnan(number):
        return "undefined"
    if 999.5 <= abs(number) < 1e7:
        return f"{number:,.0f}"
    return f"{number + 0.0:.3g}"  # -0.0 loses its sign
