# SPDX-License-Identifier: Apache-2.0
"""Replaces a model's output head by another computation for one forward pass.

FSDP gathers the head's weight only during the model's own forward, so code that needs the weight has to run inside it.
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
"""Config fields of models that change the output of the head before it is their logits."""


def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits of `model` are one linear layer of its hidden states, with nothing before or after."""
    config = model.config.get_text_config()
    is_changed = any(getattr(config, field, None) for field in LOGIT_CHANGES)
    return type(model.get_output_embeddings()) is nn.Linear and not is_changed


def forward_with_head(
    model: nn.Module,
    compute: Callable[[LazyLogits], torch.Tensor],
    inputs: dict[str, Any],
    select: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Runs one forward of `model` with `compute` in place of its output head; returns the result of `compute`.

    A model without a plain head computes its logits itself, and `compute` gets these.

    Args:
        model: a Hugging Face model or a `ValueModel`; it may be sharded or have adapters.
        compute: takes `LazyLogits`, states (..., H) with the head's whole weight (V, H); returns any tensor.
        inputs: keyword arguments of the forward.
        select: from the states at the positions of `logits_to_keep`, takes the ones whose logits are wanted.

    Raises:
        RuntimeError: the model changes the output of its head after the head.
    """
    if not has_plain_head(model):
        return compute(LazyLogits(select(model(**inputs).logits)))
    head = model.get_output_embeddings()
    results: list[torch.Tensor] = []

    def run_replacement(hidden_states: torch.Tensor) -> torch.Tensor:
        results.append(compute(LazyLogits(select(hidden_states), head.weight, head.bias)))
        return results[-1]

    head.forward = run_replacement
    try:
        logits = model(**inputs).logits  # the result of `run_replacement`, unless the model changed it
    finally:
        del head.forward
    if len(results) != 1 or logits is not results[0]:
        raise RuntimeError(
            f"{type(model).__name__} gives other logits than its output head does, and none of the fields "
            f"{', '.join(LOGIT_CHANGES)} of its config says so: it cannot be trained; use another model"
        )
    return logits


@torch.no_grad()
def capture_logits(
    model: nn.Module, inputs: dict[str, Any], select: Callable[[torch.Tensor], torch.Tensor]
) -> LazyLogits:
    """The logits of one forward, for use after it: hidden states and a copy of the head.

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
