# SPDX-License-Identifier: Apache-2.0
"""The order of an epoch's rows. It depends only on seed, epoch, numbers of rows and weights."""

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
    """(sum of sizes,) rows of several sources, in proportion to the weights.

    A source gives all its rows before it repeats one, also across epochs. Unshuffled, the sources alternate as evenly
    as their shares allow.

    Args:
        sizes: number of rows of each source; row numbers continue from source to source.
        weights: weights of the sources, above 0; their sum need not be one.
        skipped: rows to replace by others of their source, so that shares and all other places do not change.
    """
    counts = [_shares(sum(sizes), weights, number) for number in range(epoch + 1)]
    starts = np.sum(counts[:-1], axis=0, dtype=int) if epoch else np.zeros(len(sizes), dtype=int)
    rows, places = [], []
    for source, (size, first, count) in enumerate(zip(sizes, starts, counts[-1], strict=True)):
        drawn = np.arange(first, first + count)  # numbers of the draws from this source, over the run
        start = sum(sizes[:source])
        usable = np.array([row for row in range(start, start + size) if row not in skipped])
        own = start + _cycled(drawn, size, shuffle, (seed, source))
        rows.append(usable[np.searchsorted(usable, own) % len(usable)])
        places.append((np.arange(count) + 0.5) / max(count, 1))
    mixed = np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]
    return mixed[np.random.default_rng((seed, epoch)).permutation(len(mixed))] if shuffle else mixed


def _shares(total: int, weights: Sequence[float], epoch: int) -> list[int]:
    """Whole numbers with the sum `total`, in proportion to the weights on average over epochs.

    All shares are rounded down. A systematic sample of the remainders assigns the rest; its start moves by the golden
    ratio from epoch to epoch.
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
    """The rows of one source at these draws: pass after pass over all its rows, each in its own order."""
    rows = np.empty_like(drawn)
    for number in np.unique(drawn // size):
        in_pass = drawn // size == number
        order = np.random.default_rng((*seed, number)).permutation(size) if shuffle else np.arange(size)
        rows[in_pass] = order[drawn[in_pass] % size]
    return rows
