# SPDX-License-Identifier: Apache-2.0
"""The order of an epoch's rows, which seed, epoch and numbers of rows alone decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(num_rows: int, epoch: int, shuffle: bool, seed: int) -> np.ndarray:
    """(num_rows,) every row once."""
    if not shuffle:
        return np.arange(num_rows)
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def mixed_order(sizes: Sequence[int], weights: Sequence[float], epoch: int, shuffle: bool, seed: int) -> np.ndarray:
    """(sum of sizes,) rows of several sources, as many of each as its weight says.

    A source gives all its rows before it gives one again, over the ends of epochs. Unshuffled, the sources take turns
    as evenly as their shares allow.

    Args:
        sizes: rows of each source; a row's number counts those of the sources before it.
        weights: of the sources, above 0; they need not have sum one.
    """
    counts = _shares(sum(sizes), weights)
    rows, places = [], []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        drawn = np.arange(epoch * count, (epoch + 1) * count)  # of all draws from this source in the run
        rows.append(sum(sizes[:source]) + _cycled(drawn, size, shuffle, (seed, source)))
        places.append((np.arange(count) + 0.5) / max(count, 1))
    mixed = np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]
    return mixed[np.random.default_rng((seed, epoch)).permutation(len(mixed))] if shuffle else mixed


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that have the sum `total`."""
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


def _cycled(drawn: np.ndarray, size: int, shuffle: bool, seed: tuple[int, int]) -> np.ndarray:
    """The rows of one source at these draws: pass after pass over all its rows, each in an order of its own."""
    rows = np.empty_like(drawn)
    for number in np.unique(drawn // size):
        in_pass = drawn // size == number
        order = np.random.default_rng((*seed, number)).permutation(size) if shuffle else np.arange(size)
        rows[in_pass] = order[drawn[in_pass] % size]
    return rows
