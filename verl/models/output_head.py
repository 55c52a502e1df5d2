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

from verl.utils.logprobs import LazyLogits

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
    model: nn.Module,
    compute: Callable[[LazyLogits], torch.Tensor],
    inputs: dict[str, Any],
    select: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One forward of `model`, in which `compute` takes the place of its output head; returns what that returned.

    A model without a plain head makes its logits itself, and `compute` is given those.

    Args:
        model: a Hugging Face model or a `ValueModel`, also sharded or with adapters.
        compute: from logits, states (..., H) with the head's whole weight (V, H), to any tensor.
        inputs: keywords of the forward.
        select: from the states of the positions that `logits_to_keep` names, to those whose logits are wanted.

    Raises:
        RuntimeError: the model went on to change what it took for its logits.
    """
    if not has_plain_head(model):
        return compute(LazyLogits(select(model(**inputs).logits)))
    head = model.get_output_embeddings()
    results: list[torch.Tensor] = []

    def in_place_of_head(hidden_states: torch.Tensor) -> torch.Tensor:
        results.append(compute(LazyLogits(select(hidden_states), head.weight, head.bias)))
        return results[-1]

    head.forward = in_place_of_head
    try:
        given = model(**inputs).logits  # what stood in for the head's logits, unless the model went on to change it
    finally:
        del head.forward
    if len(results) != 1 or given is not results[0]:
        raise RuntimeError(
            f"{type(model).__name__} gives other logits than its output head does, and none of the fields "
            f"{', '.join(LOGIT_CHANGES)} of its config says so: it cannot be trained; use another model"
        )
    return given


@torch.no_grad()
def capture_logits(
    model: nn.Module, inputs: dict[str, Any], select: Callable[[torch.Tensor], torch.Tensor]
) -> LazyLogits:
    """The logits of one forward, to be used after it: hidden states and a copy of the head.

    The copy (V, H) is far smaller than the logits of a batch of long responses.

    Args:
        model, inputs, select: as in `forward_with_head`.
    """
    captured: list[LazyLogits] = []

    def capture(logits: LazyLogits) -> torch.Tensor:
        head = (None if tensor is None else tensor.clone() for tensor in (logits.weight, logits.bias))
        captured.append(LazyLogits(logits.states, *head))
        return logits.states

    forward_with_head(model, capture, inputs, select)
    return captured[0]
