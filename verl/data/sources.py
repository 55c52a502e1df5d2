# SPDX-License-Identifier: Apache-2.0
"""Several datasets as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import ConcatDataset

from verl.data.dataset import RLHFDataset


class JoinedDataset(ConcatDataset):
    """The rows of datasets, one after the other.

    Args:
        datasets: at least one.
    """

    def __init__(self, datasets: Sequence[RLHFDataset]) -> None:
        super().__init__(datasets)
        self.sizes = [len(dataset) for dataset in datasets]
        """Number of rows of each dataset, including rows to skip."""
        self.skipped = frozenset(
            end - len(dataset) + index
            for dataset, end in zip(datasets, self.cumulative_sizes, strict=True)
            for index in dataset.skipped
        )
        """Indices of rows that cannot be read and must not be drawn."""

    @property
    def has_videos(self) -> bool:
        """Whether any usable row has a video."""
        return any(dataset.has_videos for dataset in self.datasets)
