# SPDX-License-Identifier: Apache-2.0
"""Reads a model's last hidden states during its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def observe_hidden_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside, every forward of `model` adds its language model's last hidden states, (B, T, H), without gradient.

    These are the inputs of the output head, at all positions.

    Args:
        model: a Hugging Face model; it may be sharded or have adapters.
    """
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output.last_hidden_state.detach())

    hook = model.get_decoder().register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
