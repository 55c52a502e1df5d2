# SPDX-License-Identifier: Apache-2.0
"""Distributes rows of unequal length over ranks and micro-batches so that each has a similar number of tokens.

N sequences, S = prompt + response length, W ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from verl.protocol import DataProto
from verl.utils.response_span import prompt_lengths, response_ends


def partition_evenly(lengths: Sequence[int], num_parts: int, equal_count: bool) -> list[list[int]]:
    """Split indices into parts with similar sums of `lengths`, by Karmarkar and Karp's differencing method.

    A partial solution is a list of `num_parts` parts. The two with the widest spread are merged, the heaviest part of
    one with the lightest of the other, until one is left. Without `equal_count` each row starts as a solution;
    with it, `num_parts` rows of similar length do, one per part, so that all parts get equal counts (Michiels et al.,
    "Performance ratios for the differencing method applied to the balanced number partitioning problem", STACS 2003).

    Returns parts with ascending indices, the heaviest part first; none is empty.
    Raises ValueError when there are fewer rows than parts, or a number that does not divide for `equal_count`.
    """
    rows = len(lengths)
    if rows < num_parts or (equal_count and rows % num_parts != 0):
        wanted = "a multiple of" if equal_count else "at least"
        raise ValueError(f"cannot deal {rows} rows to {num_parts} parts; the number of rows must be {wanted} that")

    by_length = sorted(range(rows), key=lambda row: (-lengths[row], row))
    width = num_parts if equal_count else 1
    heap = []
    for start in range(0, rows, width):
        parts = [(lengths[row], [row]) for row in by_length[start : start + width]]
        parts += [(0, [])] * (num_parts - width)
        # `start` is unique: the heap compares no further, and the result is the same on every machine.
        heap.append((parts[-1][0] - parts[0][0], start, parts))
    heapq.heapify(heap)

    while len(heap) > 1:
        _, order, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        merged = [
            (heavy[0] + light[0], heavy[1] + light[1]) for heavy, light in zip(one, reversed(other), strict=True)
        ]
        merged.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], order, merged))

    return [sorted(members) for _, members in heap[0][2]]


def balanced_order(
    lengths: Sequence[int], num_ranks: int, num_mini_batches: int, costs: TokenCosts | None = None
) -> list[int]:
    """Order of rows such that equal contiguous chunks, one per rank, have similar numbers of tokens.

    Mini-batch k is rows k * G to (k + 1) * G of the incoming order, G = N / num_mini_batches, and keeps its rows: each
    rank gets G / num_ranks of them. The outgoing order is rank by rank, and mini-batch by mini-batch inside a rank, so
    every optimizer step sees the same rows whatever the number of ranks. One rank leaves the order as it is.

    lengths: N token counts. costs: given if rows share prompts; groups of equal size stay together if their number
    divides over the ranks. Returns N row indices. Raises ValueError when the rows do not divide.
    """
    if len(lengths) % (num_mini_batches * num_ranks) != 0:
        raise ValueError(
            f"{len(lengths)} rows do not divide into {num_mini_batches} mini-batches x {num_ranks} ranks; "
            f"their number must be a multiple of {num_mini_batches * num_ranks}"
        )

    size = len(lengths) // num_mini_batches
    rows_of_rank = [[] for _ in range(num_ranks)]
    tokens_of_rank = [0] * num_ranks
    for start in range(0, len(lengths), size):
        parts = _deal(range(start, start + size), lengths, num_ranks, costs)
        lightest_first = sorted(range(num_ranks), key=lambda rank: tokens_of_rank[rank])
        for rank, part in zip(lightest_first, parts, strict=True):
            rows_of_rank[rank] += part
            tokens_of_rank[rank] += _tokens(lengths, part) if costs is None else costs.total(part)
    return [row for rows in rows_of_rank for row in rows]


def _deal(rows: range, lengths: Sequence[int], num_ranks: int, costs: TokenCosts | None) -> list[list[int]]:
    """Splits rows into `num_ranks` parts with equal counts and similar tokens; keeps groups whole if possible."""
    if costs is not None and num_ranks > 1:
        groups = costs.by_group(rows)
        if len({len(members) for members in groups}) == 1 and len(groups) % num_ranks == 0:
            parts = partition_evenly([costs.total(members) for members in groups], num_ranks, equal_count=True)
            return [[row for place in part for row in groups[place]] for part in parts]
    parts = partition_evenly([lengths[row] for row in rows], num_ranks, equal_count=True)
    return [[rows.start + place for place in part] for part in parts]


def seqlen_metrics(lengths: Sequence[int], order: Sequence[int], num_ranks: int) -> dict[str, float]:
    """Tokens per rank before balancing (`min`, `max`, their difference) and after it (`balanced_min`, `balanced_max`).

    lengths: N token counts in the incoming order. order: what `balanced_order` returned.
    """
    before = _tokens_per_chunk(lengths, num_ranks)
    after = _tokens_per_chunk([lengths[row] for row in order], num_ranks)
    return {
        "global_seqlen/min": min(before),
        "global_seqlen/max": max(before),
        "global_seqlen/minmax_diff": max(before) - min(before),
        "global_seqlen/balanced_min": min(after),
        "global_seqlen/balanced_max": max(after),
        "global_seqlen/mean": sum(before) / num_ranks,
    }


@dataclass(frozen=True)
class TokenCosts:
    """Number of tokens that a model computes for rows: each row's tokens, and a group's shared prompt once."""

    own: Sequence[int]
    """Number of tokens that each row has for itself."""
    shared: Sequence[int]
    """Shared tokens of each row's group."""
    groups: Sequence[int]
    """Group index of each row."""

    @classmethod
    def from_rows(cls, lengths: Sequence[int]) -> TokenCosts:
        """Costs of rows that share nothing."""
        return cls(lengths, [0] * len(lengths), range(len(lengths)))

    @classmethod
    def from_groups(cls, lengths: Sequence[int], prompts: Sequence[int], uids: Sequence[Any]) -> TokenCosts:
        """Costs of rows that share their prompt with rows of the same uid."""
        numbers = {uid: number for number, uid in enumerate(dict.fromkeys(uids))}
        own = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
        return cls(own, prompts, [numbers[uid] for uid in uids])

    def total(self, rows: Sequence[int]) -> int:
        """Tokens of these rows together."""
        prompts = {self.groups[row]: self.shared[row] for row in rows}
        return sum(self.own[row] for row in rows) + sum(prompts.values())

    def by_group(self, rows: Sequence[int]) -> list[list[int]]:
        """These rows by group, in the order of the groups' first rows."""
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(self.groups[row], []).append(row)
        return list(members.values())


def prepare_dynamic_batch(
    data: DataProto, max_token_len: int, packed: bool = True, shares_prompts: bool = False
) -> tuple[list[DataProto], list[list[int]]]:
    """Split a rank's rows into few micro-batches of at most `max_token_len` tokens each.

    Every rank makes the same number, since the forward pass has collectives. If torch.distributed is initialised, this
    is a collective call, and ranks with fewer tokens split further. The heaviest micro-batch comes first: heavy ones
    run at the same time on all ranks, and an out-of-memory error comes at once.

    data: reads `attention_mask` (N, S), and `response_mask` (N, R) unless rows are packed without shared prompts.
    packed: rows are packed end to end, and only real tokens count. Otherwise padding counts too, and rows of similar
        length go together.
    shares_prompts: packed rows with the same non-tensor `uid` share their prompt, which counts once. A group is split
        only if it does not fit.

    Returns the micro-batches and, for each, its row indices.
    Raises ValueError when one row alone is longer than `max_token_len`.
    """
    attention_mask = data.batch["attention_mask"]
    lengths = attention_mask.sum(-1).tolist()
    if max(lengths) > max_token_len:
        raise ValueError(
            f"row {lengths.index(max(lengths))} has {max(lengths)} tokens, a micro-batch may hold {max_token_len}; "
            "raise the micro-batch size or lower data.max_prompt_length or data.max_response_length"
        )

    costs = TokenCosts.from_rows(lengths)
    if packed and shares_prompts:
        prompts = prompt_lengths(attention_mask, data.batch["response_mask"]).tolist()
        costs = TokenCosts.from_groups(lengths, prompts, data.non_tensor_batch["uid"])
    if packed:
        index_lists = _fill_packed(costs, max_token_len)
    else:
        response_mask = data.batch["response_mask"]
        prompts = prompt_lengths(attention_mask, response_mask).tolist()
        index_lists = _fill_padded(prompts, response_ends(response_mask).tolist(), max_token_len)

    num_parts = len(index_lists)
    if dist.is_initialized():
        most_parts = torch.tensor(num_parts, device=attention_mask.device)
        dist.all_reduce(most_parts, op=dist.ReduceOp.MAX)
        num_parts = int(most_parts)

    while len(index_lists) < num_parts:
        heaviest = max((rows for rows in index_lists if len(rows) > 1), key=costs.total)
        index_lists.remove(heaviest)
        groups = costs.by_group(heaviest)
        pieces = groups if len(groups) > 1 else [[row] for row in heaviest]
        halves = partition_evenly([costs.total(piece) for piece in pieces], 2, equal_count=False)
        index_lists += [sorted(row for place in half for row in pieces[place]) for half in halves]
    index_lists.sort(key=lambda rows: -costs.total(rows))
    return [data[rows] for rows in index_lists], index_lists


def _fill_packed(costs: TokenCosts, max_token_len: int) -> list[list[int]]:
    pieces = [
        piece
        for members in costs.by_group(range(len(costs.own)))
        for piece in _cut_to_fit(members, costs, max_token_len)
    ]
    sizes = [costs.total(piece) for piece in pieces]
    num_parts = -(-sum(sizes) // max_token_len)
    places = partition_evenly(sizes, num_parts, equal_count=False)
    while _tokens(sizes, places[0]) > max_token_len:
        num_parts += 1
        places = partition_evenly(sizes, num_parts, equal_count=False)
    return [sorted(row for place in part for row in pieces[place]) for part in places]


def _cut_to_fit(rows: Sequence[int], costs: TokenCosts, max_token_len: int) -> list[list[int]]:
    """One group's rows in pieces that fit, filled greedily in row order."""
    pieces: list[list[int]] = [[]]
    for row in rows:
        if costs.total([*pieces[-1], row]) > max_token_len:
            pieces.append([])
        pieces[-1].append(row)
    return pieces


def _fill_padded(prompts: Sequence[int], responses: Sequence[int], max_token_len: int) -> list[list[int]]:
    """Parts filled from the longest row on; a new part begins when the next row, with padding, does not fit."""
    index_lists: list[list[int]] = []
    longest_prompt = longest_response = 0
    for row in sorted(range(len(prompts)), key=lambda row: -prompts[row] - responses[row]):
        longest_prompt = max(longest_prompt, prompts[row])
        longest_response = max(longest_response, responses[row])
        if index_lists and (longest_prompt + longest_response) * (len(index_lists[-1]) + 1) <= max_token_len:
            index_lists[-1].append(row)
        else:
            index_lists.append([row])
            longest_prompt, longest_response = prompts[row], responses[row]
    return index_lists


def restore_dynamic_batch(
    column: torch.Tensor | np.ndarray, index_lists: Sequence[Sequence[int]]
) -> torch.Tensor | np.ndarray:
    """Undo `prepare_dynamic_batch`: rows concatenated in micro-batch order go back to their places. (N, ...)."""
    order = torch.tensor([row for rows in index_lists for row in rows])
    places = order.argsort()
    return column[places.to(column.device)] if isinstance(column, torch.Tensor) else column[places.numpy()]


def _tokens(lengths: Sequence[int], rows: Sequence[int]) -> int:
    return sum(lengths[row] for row in rows)


def _tokens_per_chunk(lengths: Sequence[int], num_chunks: int) -> list[int]:
    size = len(lengths) // num_chunks
    return [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]
