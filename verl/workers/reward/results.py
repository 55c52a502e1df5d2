# SPDX-License-Identifier: Apache-2.0
"""What reward functions return: one dict a sample, or a dict of columns; checked, and numbers made floats.

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOKEN_WEIGHTS = "token_weights"
"""The one key of a result that is no metric: a list of one weight per response token, or None."""

LARGEST_NUMBER = 1e15
"""Beyond it the variance of a batch of rewards may not fit into float32, in which advantages are computed."""


@dataclass(frozen=True)
class Scored:
    """What the reward function said of N samples."""

    results: list[dict[str, Any]]
    """The dict of each: its numbers as floats, among them `overall`, and `token_weights` as it was returned."""
    failures: list[str]
    """What is to be told of calls that failed and were made again with success, one text each."""
    token_level_scores: np.ndarray | None = None
    """(N, R) float32, where the function gave a reward to each token; None where `overall` is each sample's reward."""


def is_columns(returned: Any) -> bool:
    """Whether a result is a dict of columns, one value for each sample in each."""
    return isinstance(returned, Mapping) and all(_is_column(column) for column in returned.values())


def rows_of(columns: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """One dict a sample out of columns. A None in a column, token weights aside, leaves the key out of that sample.

    Raises:
        ValueError: a column has not `count` values.
    """
    lists = {key: list(column) for key, column in columns.items()}
    for key, values in lists.items():
        if len(values) != count:
            raise ValueError(f"returned {len(values)} values under {key!r} for {count} samples")
    return [
        {key: values[index] for key, values in lists.items() if values[index] is not None or key == TOKEN_WEIGHTS}
        for index in range(count)
    ]


def to_number(key: str, value: Any) -> float:
    """A value as a float.

    Raises:
        ValueError: it is no finite number, or one beyond `LARGEST_NUMBER`.
    """
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except OverflowError:  # an integer beyond any float
        number = math.inf
    except (TypeError, ValueError, RuntimeError):  # the last by tensors of several elements
        number = math.nan
    if not abs(number) <= LARGEST_NUMBER:
        raise ValueError(f"returned {key!r}: {shorten(value)}")
    return number


def values_by_key(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Every key of the samples' results with its values, one from each sample that has it.

    `token_weights` alone, where any sample has it, has one entry a sample, None for those without.
    """
    keys = dict.fromkeys(key for result in results for key in result)
    values = {key: [result[key] for result in results if key in result] for key in keys}
    if TOKEN_WEIGHTS in keys:
        values[TOKEN_WEIGHTS] = [result.get(TOKEN_WEIGHTS) for result in results]
    return values


def without_token_weights(values: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """What of `values_by_key` can be averaged."""
    return {key: numbers for key, numbers in values.items() if key != TOKEN_WEIGHTS}


def shorten(value: Any, limit: int = 100) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _is_column(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) and getattr(value, "ndim", 1) > 0
