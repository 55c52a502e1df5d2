# SPDX-License-Identifier: Apache-2.0
"""How one call on a worker group becomes one call per worker, and how the answers become one answer.

A worker method says with `@register(...)` how it is driven. Nothing here knows Ray or reinforcement learning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verl.protocol import DataProto


def _same_for_all(num_workers: int, args: tuple, kwargs: dict) -> list[tuple[tuple, dict]]:
    return [(args, kwargs) for _ in range(num_workers)]


def _chunk_batches(num_workers: int, args: tuple, kwargs: dict) -> list[tuple[tuple, dict]]:
    """Cuts every `DataProto` among the arguments into equal contiguous chunks, rank 0 getting the first rows."""

    def pieces(value: Any) -> list[Any]:
        return value.chunk(num_workers) if isinstance(value, DataProto) else [value] * num_workers

    args_by_rank = list(zip(*map(pieces, args), strict=True)) or [()] * num_workers
    pieces_by_name = {name: pieces(value) for name, value in kwargs.items()}
    return [
        (args_by_rank[rank], {name: values[rank] for name, values in pieces_by_name.items()})
        for rank in range(num_workers)
    ]


def _first(answers: list[Any]) -> Any:
    return answers[0]


@dataclass(frozen=True)
class Dispatch:
    """One way to drive a method over all workers.

    `split` maps (number of workers, args, kwargs) to one (args, kwargs) per rank; `gather` maps the answers, in
    rank order, to the one the caller gets.
    """

    split: Callable[[int, tuple, dict], list[tuple[tuple, dict]]]
    gather: Callable[[list[Any]], Any]


ONE_TO_ALL = Dispatch(split=_same_for_all, gather=list)
"""Every worker gets the same arguments; the caller gets the list of answers, by rank."""

DP_COMPUTE_PROTO = Dispatch(split=_chunk_batches, gather=DataProto.concat)
"""Every worker gets its rows of the batch; the caller gets the answers' rows in the batch's order."""

DP_COMPUTE_METRIC = Dispatch(split=_chunk_batches, gather=_first)
"""Every worker gets its rows of the batch; all return the same reduced numbers, of which the caller gets one copy."""


def register(dispatch: Dispatch, shared_by: str | None = None) -> Callable[[Callable], Callable]:
    """Marks a worker method as callable on the whole group, driven as `dispatch` says.

    Args:
        shared_by: name, among the group's `shares`, of how many neighbouring ranks get the same part and give the same
            answer; None for parts of each rank's own.
    """

    def mark(method: Callable) -> Callable:
        method.dispatch = dispatch
        method.shared_by = shared_by
        return method

    return mark
