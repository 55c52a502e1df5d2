# SPDX-License-Identifier: Apache-2.0
"""The public VGR functions: measure VGR from attentions, and compute token weights.

They are imported at first use, because other modules of this package must not load torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "build_token_vgr_weights_for_batch": "verl.utils.attention_token_weights",
    "compute_attention_metrics_for_batch": "verl.utils.attention_metrics",
    "extract_vision_token_spans_qwen": "verl.utils.attention_metrics",
    "get_qwen_special_token_ids": "verl.utils.attention_metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
