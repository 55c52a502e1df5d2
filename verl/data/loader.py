# SPDX-License-Identifier: Apache-2.0
"""Loads prompts for the trainer: an endless, resumable training set, and the held-out set in batches."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from verl.data.dataset import RLHFDataset, collate_fn
from verl.data.headers import require_full_batch
from verl.data.order import epoch_order, mixed_order
from verl.data.sources import JoinedDataset
from verl.trainer.config import DataConfig, data_sources
from verl.utils.process_tree import end_with_parent
from verl.utils.termination import hold_stop_signals, obey_only

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ROWS_WORTH_WORKERS = 1024
"""Smaller sets are read in this process: loader processes would take longer to start than they save."""

MAX_WORKERS = 8


class ResumableSampler(Sampler[int]):
    """The rows of one epoch in order, from a position on; each epoch has its own seeded order.

    The order depends only on `seed`, the epoch, the numbers of rows and the weights, so (epoch, position) is the whole
    state. Skipped rows keep their places in the order, so that it does not change when a bad row is found.

    Args:
        num_rows: number of rows in the set.
        shuffle: whether to permute the rows; otherwise they come in the file's order.
        seed: seed of the orders.
        skipped: rows to skip.
        sizes: number of rows of each source in the set; needed for `weights`.
        weights: relative shares of the sources in an epoch; None takes every row once per epoch.
    """

    def __init__(
        self,
        num_rows: int,
        shuffle: bool,
        seed: int,
        skipped: Collection[int] = (),
        sizes: Sequence[int] = (),
        weights: Sequence[float] | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.shuffle = shuffle
        self.seed = seed
        self.skipped = frozenset(skipped)
        self.sizes = list(sizes)
        self.weights = None if weights is None else list(weights)
        self.epoch = 0
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        return iter([row for row in self._rows_ahead() if row not in self.skipped])

    def __len__(self) -> int:
        if not self._drops_rows:
            return self.num_rows - self.position
        return sum(row not in self.skipped for row in self._rows_ahead())

    @property
    def _drops_rows(self) -> bool:
        """Whether skipped rows make an epoch shorter; in a weighted mixture other rows take their places."""
        return bool(self.skipped) and self.weights is None

    def advance(self, count: int) -> None:
        """Moves the position past the next `count` rows that are not skipped."""
        if self._drops_rows:
            places = [place for place, row in enumerate(self._rows_ahead()) if row not in self.skipped]
            count = places[count - 1] + 1
        self.position += count

    def _rows_ahead(self) -> list[int]:
        if self.weights is None:
            order = epoch_order(self.num_rows, self.epoch, self.shuffle, self.seed)
        else:
            order = mixed_order(self.sizes, self.weights, self.epoch, self.shuffle, self.seed, self.skipped)
        return order[self.position :].tolist()


class PieceSampler(Sampler[list[int]]):
    """The rows of each batch in a sampler's order, in pieces of at most `piece_size`; no piece spans two batches."""

    def __init__(self, batches: BatchSampler, piece_size: int) -> None:
        self.batches = batches
        self.piece_size = piece_size

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches:
            for first in range(0, len(rows), self.piece_size):
                yield rows[first : first + self.piece_size]


class BatchLoader:
    """Collated batches of a set in a sampler's order; every `iter` reads them again.

    Loader processes divide each batch into pieces, so a batch is ready as early as possible, and they work at most one
    batch ahead. If each process read whole batches, it would hold two of them, and the decoded media could fill the
    host's memory.

    Args:
        dataset: the set.
        batch_size: prompts per batch.
        sampler: the order of the rows, without skipped ones.
        drop_last: whether to leave out an incomplete batch at the end.
    """

    def __init__(
        self, dataset: RLHFDataset | JoinedDataset, batch_size: int, sampler: Sampler[int], drop_last: bool
    ) -> None:
        num_workers = min(MAX_WORKERS, os.cpu_count() or 1) if len(dataset) >= ROWS_WORTH_WORKERS else 0
        self.dataset = dataset
        self.num_prompts = len(dataset) - len(dataset.skipped)
        self.batch_size = batch_size
        self._sampler = sampler
        self._pieces = DataLoader(
            dataset,
            batch_sampler=PieceSampler(
                BatchSampler(sampler, batch_size, drop_last), piece_size=-(-batch_size // max(num_workers, 1))
            ),
            collate_fn=collate_fn,
            num_workers=num_workers,
            prefetch_factor=1 if num_workers else None,
            worker_init_fn=_begin_worker,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pieces: list[dict[str, Any]] = []
        with hold_stop_signals():  # loader processes start here
            source = iter(self._pieces)
        for piece in source:
            pieces.append(piece)
            if sum(len(piece["input_ids"]) for piece in pieces) == self.batch_size:
                yield _join(pieces)
                pieces = []
        if pieces:
            yield _join(pieces)

    def prompts_at(self, places: Sequence[int]) -> dict[str, Any]:
        """The prompts at some positions of the order, read by this process and collated."""
        rows = list(self._sampler)
        return collate_fn([self.dataset[rows[place]] for place in places])


def _begin_worker(_: int) -> None:
    end_with_parent()
    obey_only(multiprocessing.parent_process().pid)


def _join(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenates the tensors and object arrays of several pieces to one batch."""
    return {
        key: (torch.cat if isinstance(value, torch.Tensor) else np.concatenate)([piece[key] for piece in pieces])
        for key, value in pieces[0].items()
    }


class PromptLoader:
    """Endless batches of training prompts: after the last full batch of an epoch, the next epoch begins.

    Rows that do not fill a batch at the end of an epoch are left out; the next permutation includes them again.

    Args:
        dataset: the training set.
        batch_size: prompts per draw.
        shuffle: whether each epoch has a new random order; otherwise it has the file's order.
        seed: seed of the orders.
        weights: relative shares of the set's sources; None takes every row once per epoch.

    Raises:
        ValueError: the set has fewer rows than a batch.
    """

    def __init__(
        self,
        dataset: RLHFDataset | JoinedDataset,
        batch_size: int,
        shuffle: bool,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.num_prompts = len(dataset) - (len(dataset.skipped) if weights is None else 0)
        """Prompts per epoch; in a weighted mixture other rows take the places of skipped ones."""
        require_full_batch(self.num_prompts, batch_size)
        self.dataset = dataset
        self.batch_size = batch_size
        sizes = () if weights is None else dataset.sizes
        self._sampler = ResumableSampler(len(dataset), shuffle, seed, dataset.skipped, sizes, weights)
        self._loader = BatchLoader(dataset, batch_size, self._sampler, drop_last=True)
        self._batches: Iterator[dict[str, Any]] | None = None

    def draw(self) -> dict[str, Any]:
        """Return the next `batch_size` prompts, collated: tensors and object arrays by name."""
        if len(self._sampler) < self.batch_size:
            self._sampler.epoch += 1
            self._sampler.position = 0
            self._batches = None
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches)
        # Counted here, since the sampler runs ahead of the draws by the prefetched batches.
        self._sampler.advance(self.batch_size)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next draw, for `load_state_dict`."""
        names = ("epoch", "position", "num_rows", "shuffle", "seed")
        mixture = () if self._sampler.weights is None else ("sizes", "weights")
        return {name: getattr(self._sampler, name) for name in (*names, *mixture)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue exactly at the position of a `state_dict`, also in the middle of an epoch.

        Raises:
            ValueError: the set has another number of rows, other weights or another shuffle, so its order differs; or
                `state` was written by another program.
        """
        missing = sorted(set(self.state_dict()) - (set(state) if isinstance(state, dict) else set()))
        if missing:
            raise ValueError(
                f"the checkpoint's dataloader.pt was written by another program (it lacks {', '.join(missing)}); "
                "delete it, and manifest.json, to go on with the model and start the data anew"
            )
        for name, last in (("epoch", math.inf), ("position", self._sampler.num_rows)):
            if type(state[name]) is not int or not 0 <= state[name] <= last:
                raise ValueError(
                    f"the checkpoint's dataloader.pt has {name}={state[name]!r}, and it must be a whole number from 0 "
                    f"to {last:g}; resume from another checkpoint, or delete the file and manifest.json to start the "
                    "data anew"
                )
        for name in ("num_rows", "shuffle", "seed", "sizes", "weights"):
            now = getattr(self._sampler, name)
            saved = state.get(name, {"sizes": [], "weights": None}.get(name))
            if saved != now:
                raise ValueError(
                    f"the checkpoint's data loader had {name}={saved}, this run has {now}, so its order cannot "
                    "be taken up; use the same data, data.shuffle and data.seed, or delete the checkpoint's "
                    "dataloader.pt and manifest.json to start the data anew"
                )
        self._sampler.epoch = state["epoch"]
        self._sampler.position = state["position"]
        self._batches = None


def create_dataloader(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    model_config: PretrainedConfig | None = None,
) -> tuple[PromptLoader, BatchLoader]:
    """Load the training and the held-out set and return (train, val).

    train draws `data.mini_rollout_batch_size` prompts, or `data.rollout_batch_size` when that is null. val is an
    iterable of collated batches of `data.val_batch_size` in the file's order, the whole set at -1, the last one
    smaller if need be.

    Raises:
        ValueError: a key names no data, or `load_rows`, `RLHFDataset` or `PromptLoader` refuse the data.
    """
    for key, value in (("data.train_files", config.train_files), ("data.val_files", config.val_files)):
        if not value:
            raise ValueError(f"{key} is empty; name a data file, a folder or a dataset id of the hub")

    def load(value: str | Sequence[str]) -> JoinedDataset:
        paths = [source.path for source in data_sources(value)]
        options = dict(config=config, model_config=model_config)
        return JoinedDataset([RLHFDataset(path, tokenizer, processor, **options) for path in paths])

    train_set, val_set = load(config.train_files), load(config.val_files)
    weights = [source.weight for source in data_sources(config.train_files) if source.weight is not None] or None
    batch_size = config.mini_rollout_batch_size or config.rollout_batch_size
    in_order = ResumableSampler(len(val_set), shuffle=False, seed=0, skipped=val_set.skipped)
    val_batch_size = len(in_order) if config.val_batch_size == -1 else config.val_batch_size
    return (
        PromptLoader(train_set, batch_size, config.shuffle, config.seed, weights),
        BatchLoader(val_set, val_batch_size, in_order, drop_last=False),
    )
