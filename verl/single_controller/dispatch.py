# SPDX-License-Identifier: Apache-2.0
"""Splits a call on a worker group into one call per worker, and gathers the results.

A worker method declares its kind of dispatch with `@register(...)`. This module knows neither Ray nor reinforcement
learning.
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
    """A way to call a method on all workers.

    `split` maps (number of workers, args, kwargs) to one (args, kwargs) per rank; `gather` maps the results, in rank
    order, to the caller's result.
    """

    split: Callable[[int, tuple, dict], list[tuple[tuple, dict]]]
    gather: Callable[[list[Any]], Any]


ONE_TO_ALL = Dispatch(split=_same_for_all, gather=list)
"""Every worker gets the same arguments; the caller gets the list of results, by rank."""

DP_COMPUTE_PROTO = Dispatch(split=_chunk_batches, gather=DataProto.concat)
"""Every worker gets its rows of the batch; the caller gets the resulting rows in the batch's order."""

DP_COMPUTE_METRIC = Dispatch(split=_chunk_batches, gather=_first)
"""Every worker gets its rows of the batch; all return the same reduced numbers, and the caller gets one copy."""


def register(dispatch: Dispatch, shared_by: str | None = None) -> Callable[[Callable], Callable]:
    """Marks a worker method as callable on the whole group, with a kind of dispatch.

    Args:
        shared_by: a key of the group's `shares`: that number of neighbouring ranks gets the same part and returns the
            same result. None gives each rank its own part.
    """

    def mark(method: Callable) -> Callable:
        method.dispatch = dispatch
        method.shared_by = shared_by
        return method

    return mark
