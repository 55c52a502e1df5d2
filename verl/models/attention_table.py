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
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

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
    """Pieces that lie end to end in one batch row of T tokens, all of them. Each attends to itself, and to the piece
    that it continues.

    Samples of their own continue nothing. Where samples share a prompt, the prompt is a piece, which attends to
    itself, and each response is one that continues it.
    """

    borders: tuple[int, ...]
    """Where each piece begins, and T: 0 first."""
    group: SequenceGroup | None = None
    """The ranks that share the row, T / W tokens each; None for a row of one rank's own."""
    continued: tuple[int | None, ...] | None = None
    """For each piece the number of the piece that it continues, or None; None where no piece continues another."""

    @cached_property
    def pieces(self) -> list[Piece]:
        """In the order of the row."""
        spans = list(pairwise(self.borders))
        prefixes = self.continued or (None,) * len(spans)
        return [
            Piece(*span, *((0, 0) if prefix is None else spans[prefix]))
            for span, prefix in zip(spans, prefixes, strict=True)
        ]


class Piece(NamedTuple):
    """Positions of a piece, and of the one that it continues, which is empty where there is none."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def prefix_length(self) -> int:
        return self.prefix_end - self.prefix_start


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


def window_of_layer(module: nn.Module, keywords: dict[str, Any]) -> int | None:
    """How many tokens a layer sees, the own one included; None for all.

    Qwen2-MoE and Phi-3.5-MoE tell it to nobody but their masks, all others to the attention function too.

    Args:
        keywords: of the call of its attention function.
    """
    if keywords.get("sliding_window"):
        return keywords["sliding_window"]
    types = getattr(module.config, "layer_types", None)
    is_windowed = types is None or types[module.layer_idx] == "sliding_attention"
    return (getattr(module.config, "sliding_window", None) or None) if is_windowed else None


def _is_extended() -> bool:
    return "get_interface" in vars(ALL_ATTENTION_FUNCTIONS)


def _extended(attend: Attend) -> Attend:
    # The first parameters' names are those that some models pass by keyword.
    def extended(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        samples: PackedSamples | None = keywords.pop(SAMPLES, None)
        # Some models hand the keyword to their vision tower as well, whose layers have no number.
        if samples is None or not isinstance(getattr(module, "layer_idx", None), int):
            _require_a_mask(module, args[1] if len(args) > 1 else keywords.get("attention_mask"))
            output = attend(module, query, key, *args, **keywords)
            _show(module, query, key, keywords)
            return output
        return _attend_packed(attend, samples, module, query, key, *args, **keywords)

    return extended


def _require_a_mask(module: nn.Module, mask: Any) -> None:
    if isinstance(mask, torch.Tensor) and tuple(mask.shape) == NOT_A_MASK:
        raise RuntimeError(
            f"{type(module).__name__} is not told where packed samples begin: its model passes no further keywords on "
            "to its attention; set padding_free=false, and ulysses_size=1"
        )


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
    keywords["sliding_window"] = window_of_layer(module, keywords)
    group = samples.group
    if group is not None:
        query, key, value = group.exchange_heads(query, key, value)
    if module.config._attn_implementation == "flash_attention_2":
        borders, key_places = _flash_borders(samples, query.device)
        own = (key, value)
        if key_places is not None:
            own = tuple(tensor.index_select(2, key_places) for tensor in own)
        output, _ = attend(module, query, *own, None, **keywords, **borders)
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


@lru_cache(maxsize=1)  # all layers ask for the same, and each time the CPU would wait for the device
def _flash_borders(samples: PackedSamples, device: torch.device) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Keywords of FlashAttention, which lets the last query of a piece see the last of its keys; and the positions of
    each piece's keys, one piece after the other, or None where they are the row's own."""
    borders = torch.tensor(samples.borders, dtype=torch.int32, device=device)
    longest = max(piece.length for piece in samples.pieces)
    queries = dict(cu_seq_lens_q=borders, max_length_q=longest)
    if samples.continued is None:
        return dict(**queries, cu_seq_lens_k=borders, max_length_k=longest), None
    lengths = [piece.prefix_length + piece.length for piece in samples.pieces]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    spans = [span for piece in samples.pieces for span in (piece[2:], piece[:2])]  # prefix, then the piece itself
    key_places = torch.cat([torch.arange(*span, device=device) for span in spans])
    return dict(**queries, cu_seq_lens_k=ends, max_length_k=max(lengths)), key_places


def _one_by_one(
    attend: Attend,
    samples: PackedSamples,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **keywords: Any,
) -> torch.Tensor:
    """Attention piece by piece, whose cost grows with the pieces' own lengths and not with the whole row's."""
    window = keywords["sliding_window"]
    outputs = []
    for piece in samples.pieces:
        keys, values = (_with_prefix(tensor, piece) for tensor in (key, value))
        sees_all = window is None or piece.prefix_length + piece.length <= window
        if sees_all and piece.prefix_length < piece.length:
            # Half of a square without a mask is less than a rectangle with one; the prefix's part is not used.
            output, _ = attend(module, _with_prefix(query, piece), keys, values, None, **keywords)
            outputs.append(output[:, piece.prefix_length :])
            continue
        mask = _mask_of(piece, None if sees_all else window, query)
        outputs.append(attend(module, query[:, :, piece.start : piece.end], keys, values, mask, **keywords)[0])
    return torch.cat(outputs, dim=1)  # (1, T, H, D)


def _with_prefix(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """(1, H, prefix and piece, D) from (1, H, T, D)."""
    own = tensor[:, :, piece.start : piece.end]
    if piece.prefix_length == 0:
        return own
    return torch.cat([tensor[:, :, piece.prefix_start : piece.prefix_end], own], dim=2)


def _mask_of(piece: Piece, window: int | None, query: torch.Tensor) -> torch.Tensor:
    """(1, 1, length, prefix and length) bool: a token sees itself and what came before, or the last `window` of it."""
    keys = torch.arange(piece.prefix_length + piece.length, device=query.device)
    behind = keys[piece.prefix_length :, None] - keys  # (length, prefix and length)
    visible = behind >= 0
    return (visible if window is None else visible & (behind < window))[None, None]
