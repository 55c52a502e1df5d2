# SPDX-License-Identifier: Apache-2.0
"""The one place that reaches into transformers' attention: what happens around the attention of a decoder layer.

transformers looks every layer's attention function up in a table, each time the layer runs; `extend_attention` has the
table hand them out with rings around them. The functions keep their names: other names lose the causal mask or a
vision tower's fast path without a word.

Shapes: N samples, T tokens in a row, W ranks that share it, H heads, D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verl.models.sequence_parallel import SequenceGroup

SAMPLES = "packed_samples"
"""The keyword under which a model's forward is given its `PackedSamples`.

Models pass it on to their attention, like any keyword that they do not know. It thus reaches layers that gradient
checkpointing runs once more in the backward pass, when no context of the forward is open any longer.
"""

PACKING_IMPLEMENTATIONS = ("sdpa", "flash_attention_2")
"""Implementations of attention that can keep packed samples apart."""

NOT_A_MASK = (1, 1, 0, 0)
"""Shape of what packed rows have in place of an attention mask: the models pass it through untouched, whereas they
would make a (T, T) mask of none. A layer that does not take its attention from the table, and would let samples see
each other, fails on it."""

Attend = Callable[..., tuple[torch.Tensor, Any]]
Tap = Callable[..., None]

_taps: list[Tap] = []


@dataclass(frozen=True)
class PackedSamples:
    """N samples that lie end to end in one batch row of T tokens, all of them."""

    borders: tuple[int, ...]
    """Where each sample begins, and T: 0 first, N + 1 in all."""
    group: SequenceGroup | None = None
    """The ranks that share the row, T / W tokens each; None for a row of one rank's own."""


def extend_attention() -> None:
    """Puts the rings around transformers' attention, for the life of the process; once is enough. Innermost first:

    1. Samples that lie end to end in one row attend each to itself.
    2. Taps look at the queries and keys (`tapped_attention`).
    3. Where ranks share the row, each gives all positions of some heads for some positions of all heads, and back.

    1 and 3 act on calls that bring `PackedSamples` along, and on nothing else.
    """
    if _is_extended():
        return
    hand_out = ALL_ATTENTION_FUNCTIONS.get_interface

    def hand_out_extended(attn_implementation: str, default: Attend) -> Attend:
        # Eager attention has no entry: every modeling file offers its own as the default, some one for each tower.
        return _extended(hand_out(attn_implementation, default))

    ALL_ATTENTION_FUNCTIONS.get_interface = hand_out_extended


@contextmanager
def tapped_attention(tap: Tap) -> Iterator[None]:
    """Shows every attention function's module, query, key and keywords to `tap`, after the function has run.

    The table is left as it was found, extended or not.

    Args:
        tap: called as tap(module, query (B, H, T, D), key (B, Hkv, T, D), **keywords).
    """
    was_extended = _is_extended()
    extend_attention()
    _taps.append(tap)
    try:
        yield
    finally:
        _taps.remove(tap)
        if not was_extended:
            del ALL_ATTENTION_FUNCTIONS.get_interface


def _is_extended() -> bool:
    return "get_interface" in vars(ALL_ATTENTION_FUNCTIONS)


def _extended(attend: Attend) -> Attend:
    # The first parameters' names are those that some models pass by keyword.
    def extended(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        samples: PackedSamples | None = keywords.pop(SAMPLES, None)
        # Some models hand the keyword to their vision tower as well, whose layers have no number.
        if samples is None or not isinstance(getattr(module, "layer_idx", None), int):
            output = attend(module, query, key, *args, **keywords)
            _show(module, query, key, keywords)
            return output
        return _attend_packed(attend, samples, module, query, key, *args, **keywords)

    return extended


def _show(module: nn.Module, query: torch.Tensor, key: torch.Tensor, keywords: dict[str, Any]) -> None:
    for tap in _taps:
        tap(module, query, key, **keywords)


def _attend_packed(
    attend: Attend,
    samples: PackedSamples,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """(1, T, H, D), or (1, T / W, H, D) where ranks share the row; query, key and value are (1, H, T or T / W, D)."""
    assert tuple(attention_mask.shape) == NOT_A_MASK, "packed samples know by themselves who attends to whom"
    window = keywords.get("sliding_window") or _window_of_masks(module)
    if window:
        keywords["sliding_window"] = window
    group = samples.group
    if group is not None:
        query, key, value = group.exchange_heads(query, key, value)
    if module.config._attn_implementation == "flash_attention_2":
        output, _ = attend(module, query, key, value, None, **keywords, **_flash_borders(samples, query.device))
    else:
        output = _one_by_one(attend, samples, _with_own_heads(module, query, key), query, key, value, **keywords)
    _show(module, query, key, keywords)
    return (output if group is None else group.exchange_positions(output)), None


def _with_own_heads(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> nn.Module:
    """The layer as SDPA is to see it: it repeats a key for so many queries as the layer names, where there is a mask.

    A rank that has one of the repeated keys (`SequenceGroup.exchange_heads`) has fewer queries for it.
    """
    groups = query.shape[1] // key.shape[1]
    if getattr(module, "num_key_value_groups", groups) == groups:
        return module
    own = copy.copy(module)
    own.num_key_value_groups = groups
    return own


def _window_of_masks(module: nn.Module) -> int | None:
    """The window of a layer that tells it to nobody but the model's masks, as those of Qwen2-MoE and Phi-3.5-MoE."""
    types = getattr(module.config, "layer_types", None)
    is_windowed = types is None or types[module.layer_idx] == "sliding_attention"
    return getattr(module.config, "sliding_window", None) if is_windowed else None


@lru_cache(maxsize=1)  # all layers ask for the same, and each time the CPU would wait for the device
def _flash_borders(samples: PackedSamples, device: torch.device) -> dict[str, Any]:
    borders = torch.tensor(samples.borders, dtype=torch.int32, device=device)
    longest = max(end - start for start, end in pairwise(samples.borders))
    return dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=longest, max_length_k=longest)


def _one_by_one(
    attend: Attend,
    samples: PackedSamples,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **keywords: Any,
) -> torch.Tensor:
    """Attention without a mask, whose cost grows with the samples' own lengths and not with the whole row's."""
    window = keywords.get("sliding_window")
    outputs = []
    for start, end in pairwise(samples.borders):
        own = (slice(None), slice(None), slice(start, end))
        mask = None if window is None or end - start <= window else _window_mask(end - start, window, query.device)
        outputs.append(attend(module, query[own], key[own], value[own], mask, **keywords)[0])
    return torch.cat(outputs, dim=1)  # (1, T, H, D)


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """(1, 1, length, length) bool: each token sees itself and the `window` - 1 before it."""
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)  # (length, length)
    return ((behind >= 0) & (behind < window))[None, None]
