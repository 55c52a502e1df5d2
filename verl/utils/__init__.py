# SPDX-License-Identifier: Apache-2.0
"""What users call: VGR measured from attentions, and the token weights made of it.

Loaded at the first use, so that modules beside them which need no torch do not load it.
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
