# SPDX-License-Identifier: Apache-2.0
"""Dealing rows of unequal length to ranks and micro-batches so that each has a similar number of tokens.

N sequences, S = prompt + response length, W ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
import torch.distributed as dist

from verl.protocol import DataProto
from verl.utils.response_span import prompt_lengths, response_ends


def partition_evenly(lengths: Sequence[int], num_parts: int, equal_count: bool) -> list[list[int]]:
    """Split indices into parts with similar sums of `lengths`, by Karmarkar and Karp's differencing method.

    A partial solution is a list of `num_parts` parts. The two with the widest spread are merged, the heaviest part of
    one with the lightest of the other, until one is left. Without `equal_count` one starts from each row alone; with
    it, from rows of neighbouring length, one for each part, so that parts end with equal counts (Michiels et al.,
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
        # The unique `start` keeps the heap from comparing further, and the result the same everywhere.
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


def balanced_order(lengths: Sequence[int], num_ranks: int, num_mini_batches: int) -> list[int]:
    """Order of rows in which equal contiguous chunks over ranks carry similar numbers of tokens.

    Mini-batch k is rows k * G to (k + 1) * G of the incoming order, G = N / num_mini_batches, and keeps its rows: each
    rank gets G / num_ranks of them. The outgoing order is rank by rank, and mini-batch by mini-batch inside a rank, so
    every optimizer step sees the same rows whatever the number of ranks. One rank leaves the order as it is.

    lengths: N token counts. Returns N row indices. Raises ValueError when the rows do not divide.
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
        parts = partition_evenly(lengths[start : start + size], num_ranks, equal_count=True)
        lightest_first = sorted(range(num_ranks), key=lambda rank: tokens_of_rank[rank])
        for rank, part in zip(lightest_first, parts, strict=True):
            rows_of_rank[rank] += [start + row for row in part]
            tokens_of_rank[rank] += sum(lengths[start + row] for row in part)
    return [row for rows in rows_of_rank for row in rows]


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


def prepare_dynamic_batch(
    data: DataProto, max_token_len: int, packed: bool = True
) -> tuple[list[DataProto], list[list[int]]]:
    """Split a rank's rows into few micro-batches of at most `max_token_len` tokens each.

    Every rank makes the same number of them, as collectives in the forward pass demand: where torch.distributed is
    initialised this is a collective call, and ranks with less to do split further. The heaviest micro-batch comes
    first, which pairs heavy ones across ranks and meets an out-of-memory error at once.

    data: `attention_mask` (N, S) is read, and of rows that are not packed `response_mask` (N, R).
    packed: rows lie end to end, so that only their real tokens count; else side by side, where the padding that they
        need beside each other counts too, and rows of like length go together.

    Returns the micro-batches and, for each, the row indices it took.
    Raises ValueError when one row alone is longer than `max_token_len`.
    """
    attention_mask = data.batch["attention_mask"]
    lengths = attention_mask.sum(-1).tolist()
    if max(lengths) > max_token_len:
        raise ValueError(
            f"row {lengths.index(max(lengths))} has {max(lengths)} tokens, a micro-batch may hold {max_token_len}; "
            "raise the micro-batch size or lower data.max_prompt_length or data.max_response_length"
        )

    if packed:
        index_lists = _fill_packed(lengths, max_token_len)
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
        heaviest = max((rows for rows in index_lists if len(rows) > 1), key=lambda rows: _tokens(lengths, rows))
        index_lists.remove(heaviest)
        halves = partition_evenly([lengths[row] for row in heaviest], 2, equal_count=False)
        index_lists += [[heaviest[place] for place in half] for half in halves]
    index_lists.sort(key=lambda rows: -_tokens(lengths, rows))
    return [data[rows] for rows in index_lists], index_lists


def _fill_packed(lengths: Sequence[int], max_token_len: int) -> list[list[int]]:
    num_parts = -(-sum(lengths) // max_token_len)
    index_lists = partition_evenly(lengths, num_parts, equal_count=False)
    while _tokens(lengths, index_lists[0]) > max_token_len:
        num_parts += 1
        index_lists = partition_evenly(lengths, num_parts, equal_count=False)
    return index_lists


def _fill_padded(prompts: Sequence[int], responses: Sequence[int], max_token_len: int) -> list[list[int]]:
    """Rows from the longest on; a new part begins where the next row, or what it adds to the width, is too much."""
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


def restore_dynamic_batch(tensor: torch.Tensor, index_lists: Sequence[Sequence[int]]) -> torch.Tensor:
    """Undo `prepare_dynamic_batch`: rows concatenated in micro-batch order go back to their places. (N, ...)."""
    order = torch.tensor([row for rows in index_lists for row in rows], device=tensor.device)
    return tensor[order.argsort()]


def _tokens(lengths: Sequence[int], rows: Sequence[int]) -> int:
    return sum(lengths[row] for row in rows)


def _tokens_per_chunk(lengths: Sequence[int], num_chunks: int) -> list[int]:
    size = len(lengths) // num_chunks
    return [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]
