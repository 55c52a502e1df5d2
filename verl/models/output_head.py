# SPDX-License-Identifier: Apache-2.0
"""Puts another computation in the place of a model's output head, for one forward.

FSDP gathers the head's weight for the time of the model's own forward and no longer, so that whoever needs it has to
work in there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_soft_cap",
    "output_multiplier",
)
"""Fields by which the configs of some models say that what the head gives is not yet their logits."""


def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits of `model` are its hidden states through one linear layer, with nothing before or after."""
    config = model.config.get_text_config()
    is_changed = any(getattr(config, field, None) for field in LOGIT_CHANGES)
    return type(model.get_output_embeddings()) is nn.Linear and not is_changed


def forward_with_head(
    model: nn.Module, compute: Callable[[torch.Tensor, nn.Linear], torch.Tensor], inputs: dict[str, Any]
) -> torch.Tensor:
    """One forward of `model`, in which `compute` takes the place of its output head; returns what that returned.

    Args:
        model: a Hugging Face model with a plain head, also sharded or with adapters.
        compute: from the hidden states of the positions that `logits_to_keep` names, (..., H), and the head, whose
            weight (V, H) is whole, to any tensor.
        inputs: keywords of the forward.

    Raises:
        RuntimeError: the model went on to change what it took for its logits.
    """
    head = model.get_output_embeddings()
    results: list[torch.Tensor] = []

    def in_place_of_head(hidden_states: torch.Tensor) -> torch.Tensor:
        results.append(compute(hidden_states, head))
        return results[-1]

    head.forward = in_place_of_head
    try:
        logits = model(**inputs).logits
    finally:
        del head.forward
    if len(results) != 1 or logits is not results[0]:
        raise RuntimeError(
            f"{type(model).__name__} gives other logits than its output head does, and none of the fields "
            f"{', '.join(LOGIT_CHANGES)} of its config says so: it cannot be trained; use another model"
        )
    return logits
