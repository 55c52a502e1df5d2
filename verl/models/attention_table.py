# SPDX-License-Identifier: Apache-2.0
"""Extends the attention functions of transformers. No other module touches them.

Each time a layer runs, transformers looks up its attention function in a table. `extend_attention` makes the table
return wrapped functions. The functions keep their names: under other names transformers silently drops the causal mask
or a vision tower's fast path.

Shapes: N samples, T tokens in a row, W ranks that share it, H heads, D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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

Models pass unknown keywords on to their attention. This also works for layers that gradient checkpointing recomputes
in the backward pass, after every context around the forward has closed.
"""

PACKING_IMPLEMENTATIONS = ("sdpa", "flash_attention_2")
"""Attention implementations that can keep packed samples apart."""

NOT_A_MASK = (1, 1, 0, 0)
"""Shape of the placeholder that packed rows pass as attention mask. Models pass it through unchanged; without it they
would build a (T, T) mask. A layer that bypasses the table, and would let samples see each other, fails on it."""

Attend = Callable[..., tuple[torch.Tensor, Any]]
Tap = Callable[..., None]

_taps: list[Tap] = []


@dataclass(frozen=True)
class PackedSamples:
    """Pieces that fill one batch row of T tokens, end to end. Each attends to itself and to the piece it continues.

    Independent samples continue nothing. If samples share a prompt, the prompt is one piece, and each response is a
    piece that continues it.
    """

    borders: tuple[int, ...]
    """The start of each piece, and T at the end; begins with 0."""
    group: SequenceGroup | None = None
    """The ranks that share the row, T / W tokens each; None if one rank has the whole row."""
    continued: tuple[int | None, ...] | None = None
    """For each piece the index of the piece that it continues, or None; None if no piece continues another."""

    @property
    def prefixes(self) -> tuple[int | None, ...]:
        """`continued`, also if no piece continues another."""
        return self.continued or (None,) * (len(self.borders) - 1)

    @cached_property
    def pieces(self) -> list[Piece]:
        """In the order of the row."""
        spans = list(pairwise(self.borders))
        return [
            Piece(*span, *((0, 0) if prefix is None else spans[prefix]))
            for span, prefix in zip(spans, self.prefixes, strict=True)
        ]


class Piece(NamedTuple):
    """Positions of a piece and of its prefix, the piece that it continues; the prefix may be empty."""

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
    """Wraps transformers' attention for the life of the process; further calls do nothing. Innermost first:

    1. Samples that are packed in one row attend only to themselves.
    2. Taps read the queries and keys (`tapped_attention`).
    3. If ranks share the row, they exchange their positions of all heads for all positions of some heads, and back.

    1 and 3 apply only to calls with `PackedSamples`.
    """
    if _is_extended():
        return
    hand_out = ALL_ATTENTION_FUNCTIONS.get_interface

    def hand_out_extended(attn_implementation: str, default: Attend) -> Attend:
        # Eager attention has no entry: every modeling file passes its own as the default, some one per tower.
        return _extended(hand_out(attn_implementation, default))

    ALL_ATTENTION_FUNCTIONS.get_interface = hand_out_extended


@contextmanager
def tapped_attention(tap: Tap) -> Iterator[None]:
    """Inside, calls `tap` after every attention function, with its module, query, key and keywords.

    Afterwards the table is as before, extended or not.

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
    """The sliding window of a layer in tokens, the current one included; None for full attention.

    Most models pass the window to the attention function; Qwen2-MoE and Phi-3.5-MoE only build it into their masks.

    Args:
        keywords: the keyword arguments of its attention function.
    """
    if keywords.get("sliding_window"):
        return keywords["sliding_window"]
    types = getattr(module.config, "layer_types", None)
    is_windowed = types is None or types[module.layer_idx] == "sliding_attention"
    return (getattr(module.config, "sliding_window", None) or None) if is_windowed else None


def _is_extended() -> bool:
    return "get_interface" in vars(ALL_ATTENTION_FUNCTIONS)


def _extended(attend: Attend) -> Attend:
    # Some models pass the first parameters by keyword, under these names.
    def extended(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        samples: PackedSamples | None = keywords.pop(SAMPLES, None)
        # Some models pass the keyword to their vision tower as well, whose layers have no number.
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
            f"{type(module).__name__} does not learn where packed samples begin: its model passes no further keywords "
            "on to its attention; set padding_free=false, and ulysses_size=1"
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
    assert tuple(attention_mask.shape) == NOT_A_MASK, "packed samples take no attention mask"
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
        output = _one_by_one(attend, samples, _with_local_heads(module, query, key), query, key, value, **keywords)
    _show(module, query, key, keywords)
    return (output if group is None else group.exchange_positions(output)), None


def _with_local_heads(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> nn.Module:
    """The layer with the number of query heads per key head that SDPA needs to repeat key heads, if there is a mask.

    A rank with a repeated key head (`SequenceGroup.exchange_heads`) has fewer query heads for it than the layer says.
    """
    groups = query.shape[1] // key.shape[1]
    if getattr(module, "num_key_value_groups", groups) == groups:
        return module
    own = copy.copy(module)
    own.num_key_value_groups = groups
    return own


@lru_cache(maxsize=1)  # once for all layers: it waits for the device
def _flash_borders(samples: PackedSamples, device: torch.device) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Keywords for FlashAttention, which aligns a piece's last query with its last key; and the positions of the keys,
    piece after piece, or None if they are all positions of the row in order."""
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
    """Attention piece by piece: the cost depends on the pieces' lengths, not on the row's."""
    window = keywords["sliding_window"]
    queries, keys, values = (_by_piece(tensor, samples) for tensor in (query, key, value))
    outputs = []
    for index, (piece, prefix) in enumerate(zip(samples.pieces, samples.prefixes, strict=True)):
        seen_keys, seen_values = (_with_prefix(tensors, index, prefix) for tensors in (keys, values))
        sees_all = window is None or piece.prefix_length + piece.length <= window
        if sees_all and piece.prefix_length < piece.length:
            # A causal square without a mask costs less than a rectangle with one; the prefix's output is not used.
            square_queries = _with_prefix(queries, index, prefix)
            output, _ = attend(module, square_queries, seen_keys, seen_values, None, **keywords)
            outputs.append(output[:, piece.prefix_length :])
            continue
        mask = _mask_of(piece, None if sees_all else window, query)
        outputs.append(attend(module, queries[index], seen_keys, seen_values, mask, **keywords)[0])
    return torch.cat(outputs, dim=1)  # (1, T, H, D)


def _by_piece(tensor: torch.Tensor, samples: PackedSamples) -> tuple[torch.Tensor, ...]:
    """Each piece's part of (1, H, T, D), as (1, H, length, D).

    One split and not a slice per piece: the gradient of a slice has the size of the row, so that the backward pass
    would grow with the square of the number of pieces.
    """
    return tensor.split([piece.length for piece in samples.pieces], dim=2)


def _with_prefix(tensors: Sequence[torch.Tensor], index: int, prefix: int | None) -> torch.Tensor:
    """(1, H, prefix and piece, D)."""
    return tensors[index] if prefix is None else torch.cat([tensors[prefix], tensors[index]], dim=2)


def _mask_of(piece: Piece, window: int | None, query: torch.Tensor) -> torch.Tensor:
    """(1, 1, length, prefix and length) bool: a token sees itself and all earlier tokens, or the last `window`."""
    keys = torch.arange(piece.prefix_length + piece.length, device=query.device)
    behind = keys[piece.prefix_length :, None] - keys  # (length, prefix and length)
    visible = behind >= 0
    return (visible if window is None else visible & (behind < window))[None, None]
