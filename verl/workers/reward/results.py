# SPDX-License-Identifier: Apache-2.0
"""Checks the results of reward functions, one dict per sample or a dict of columns, and converts numbers to floats.

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOKEN_WEIGHTS = "token_weights"
"""The only key of a result that is no metric: a list of one weight per response token, or None."""

LARGEST_NUMBER = 1e15
"""Above it, the variance of a batch of rewards may overflow float32, in which advantages are computed."""


@dataclass(frozen=True)
class Scored:
    """The reward function's results for N samples."""

    results: list[dict[str, Any]]
    """One dict per sample: its numbers as floats, among them `overall`, and `token_weights` as returned."""
    failures: list[str]
    """Messages about calls that failed once and then succeeded."""
    token_level_scores: np.ndarray | None = None
    """(N, R) float32 if the function rewards each token; None if `overall` is the sample's reward."""


def is_columns(returned: Any) -> bool:
    """Whether a result is a dict of columns with one value per sample."""
    return isinstance(returned, Mapping) and all(_is_column(column) for column in returned.values())


def rows_of(columns: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Turns columns into one dict per sample. A None in a column, except token weights, omits the key for that sample.

    Raises:
        ValueError: a column does not have `count` values.
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
        ValueError: it is no finite number, or larger than `LARGEST_NUMBER`.
    """
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except OverflowError:  # an integer too large for a float
        number = math.inf
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor with several elements
        number = math.nan
    if not abs(number) <= LARGEST_NUMBER:
        raise ValueError(f"returned {key!r}: {shorten(value)}")
    return number


def values_by_key(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each key in the samples' results, from the samples that have the key.

    Only `token_weights`, if any sample has it, has one entry per sample, None for samples without it.
    """
    keys = dict.fromkeys(key for result in results for key in result)
    values = {key: [result[key] for result in results if key in result] for key in keys}
    if TOKEN_WEIGHTS in keys:
        values[TOKEN_WEIGHTS] = [result.get(TOKEN_WEIGHTS) for result in results]
    return values


def without_token_weights(values: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """`values_by_key` without token weights: the values that can be averaged."""
    return {key: numbers for key, numbers in values.items() if key != TOKEN_WEIGHTS}


def shorten(value: Any, limit: int = 100) -> str:
    """A value in short form for an error message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _is_column(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) and getattr(value, "ndim", 1) > 0
