# SPDX-License-Identifier: Apache-2.0
"""The order of an epoch's rows, which seed, epoch and numbers of rows alone decide."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def epoch_order(num_rows: int, epoch: int, shuffle: bool, seed: int) -> np.ndarray:
    """(num_rows,) every row once."""
    if not shuffle:
        return np.arange(num_rows)
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def mixed_order(
    sizes: Sequence[int],
    weights: Sequence[float],
    epoch: int,
    shuffle: bool,
    seed: int,
    skipped: Collection[int] = (),
) -> np.ndarray:
    """(sum of sizes,) rows of several sources, as many of each as its weight says.

    A source gives all its rows before it gives one again, over the ends of epochs. Unshuffled, the sources take turns
    as evenly as their shares allow.

    Args:
        sizes: rows of each source; a row's number counts those of the sources before it.
        weights: of the sources, above 0; they need not have sum one.
        skipped: rows whose places other rows of their source take, so that shares and all other places stay.
    """
    counts = [_shares(sum(sizes), weights, number) for number in range(epoch + 1)]
    firsts = np.sum(counts[:-1], axis=0, dtype=int) if epoch else np.zeros(len(sizes), dtype=int)
    rows, places = [], []
    for source, (size, first, count) in enumerate(zip(sizes, firsts, counts[-1], strict=True)):
        drawn = np.arange(first, first + count)  # of all draws from this source in the run
        start = sum(sizes[:source])
        usable = np.array([row for row in range(start, start + size) if row not in skipped])
        own = start + _cycled(drawn, size, shuffle, (seed, source))
        rows.append(usable[np.searchsorted(usable, own) % len(usable)])
        places.append((np.arange(count) + 0.5) / max(count, 1))
    mixed = np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]
    return mixed[np.random.default_rng((seed, epoch)).permutation(len(mixed))] if shuffle else mixed


def _shares(total: int, weights: Sequence[float], epoch: int) -> list[int]:
    """Whole numbers that have the sum `total`, in the mean over epochs in proportion to the weights.

    What is left over when all are rounded down goes to sources by a systematic sample of the remainders, whose start
    moves by the golden ratio from epoch to epoch.
    """
    exact = np.asarray(weights) / np.sum(weights) * total
    counts = np.floor(exact + 1e-9).astype(int)
    left = total - counts.sum()
    if left > 0:
        ends = np.cumsum(np.clip(exact - counts, 0, None))
        points = (np.arange(left) + (epoch * (5**0.5 - 1) / 2 + 0.5) % 1) * (ends[-1] / left)
        np.add.at(counts, np.searchsorted(ends, points, side="right").clip(max=len(counts) - 1), 1)
    return counts.tolist()


def _cycled(drawn: np.ndarray, size: int, shuffle: bool, seed: tuple[int, int]) -> np.ndarray:
    """The rows of one source at these draws: pass after pass over all its rows, each in an order of its own."""
    rows = np.empty_like(drawn)
    for number in np.unique(drawn // size):
        in_pass = drawn // size == number
        order = np.random.default_rng((*seed, number)).permutation(size) if shuffle else np.arange(size)
        rows[in_pass] = order[drawn[in_pass] % size]
    return rows
