# SPDX-License-Identifier: Apache-2.0
"""The batch that travels between the trainer and its workers: tensors, plain objects and facts about the whole.

Shape letters, used all over the package: N sequences, P prompt length, R response length, S = P + R, V vocabulary,
B prompts, n responses per prompt, W world size.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from tensordict import TensorDict


@dataclass
class DataProtoItem:
    """One row of a DataProto: what `data[3]` gives."""

    batch: TensorDict | None
    non_tensor_batch: dict[str, Any]
    meta_info: dict[str, Any]


@dataclass(eq=False)
class DataProto:
    """N rows, each with tensors and plain objects, and `meta_info` about all of them.

    Reordering, slicing, repeating and concatenating always move tensors and objects of a row together. Lookups are
    strict: a key that is not there is a KeyError that lists those that are.

    Methods that nothing in this package calls (`pop`, `save_to_disk`, `load_from_disk`) are part of EasyR1's surface,
    which its users' programs call.
    """

    batch: TensorDict | None = None
    """Tensors whose first dimension is N. None when there are only objects."""
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    """One-dimensional object arrays of length N. Lists and other arrays are turned into such, row by row."""
    meta_info: dict[str, Any] = field(default_factory=dict)
    """Facts about the batch as a whole; every part cut from it carries them all."""

    def __post_init__(self) -> None:
        self.non_tensor_batch = {key: _object_rows(rows) for key, rows in self.non_tensor_batch.items()}
        for key, rows in self.non_tensor_batch.items():
            assert len(rows) == len(self), f"non_tensor_batch['{key}'] has {len(rows)} rows, the batch {len(self)}"

    def __len__(self) -> int:
        if self.batch is not None:
            return self.batch.batch_size[0]
        return len(next(iter(self.non_tensor_batch.values()), ()))

    @overload
    def __getitem__(self, rows: int) -> DataProtoItem: ...

    @overload
    def __getitem__(self, rows: slice | Sequence | np.ndarray | torch.Tensor) -> DataProto: ...

    def __getitem__(self, rows: int | slice | Sequence | np.ndarray | torch.Tensor) -> DataProtoItem | DataProto:
        """An int gives a DataProtoItem; a slice, indices or a boolean mask give a DataProto."""
        if isinstance(rows, (int, np.integer)):
            return DataProtoItem(
                batch=None if self.batch is None else self.batch[int(rows)],
                non_tensor_batch={key: values[rows] for key, values in self.non_tensor_batch.items()},
                meta_info=dict(self.meta_info),
            )

        index: Any = (
            rows if isinstance(rows, slice) else _as_index(rows)
        )  # TensorDict does not say that it takes arrays
        return DataProto(
            batch=None if self.batch is None else self.batch[index],
            non_tensor_batch={key: values[index] for key, values in self.non_tensor_batch.items()},
            meta_info=dict(self.meta_info),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled tensor brings its whole storage along, so one of W chunks would weigh as much as the batch.
        content: dict[str, Any] = {} if self.batch is None else dict(self.batch.items())
        tensors = None if self.batch is None else {key: _compact(value) for key, value in content.items()}
        return {
            "tensors": tensors,
            "batch_size": None if self.batch is None else tuple(self.batch.batch_size),
            "non_tensor_batch": self.non_tensor_batch,
            "meta_info": self.meta_info,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = state["tensors"]
        self.batch = None if tensors is None else TensorDict(tensors, batch_size=state["batch_size"])
        self.non_tensor_batch = state["non_tensor_batch"]
        self.meta_info = state["meta_info"]

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, torch.Tensor] | None = None,
        non_tensors: Mapping[str, Sequence | np.ndarray] | None = None,
        meta_info: dict[str, Any] | None = None,
        num_batch_dims: int = 1,
    ) -> DataProto:
        """Build from tensors with the same number of rows, and from rows of objects; either may be left out.

        Args:
            num_batch_dims: 1. Callers of EasyR1 may pass it; its checks refuse more.

        Raises AssertionError when they do not agree, or for more batch dimensions.
        """
        assert num_batch_dims == 1, f"num_batch_dims={num_batch_dims}, but batches have one dimension, their rows"
        tensors = tensors or {}
        batch_size = None
        for key, tensor in tensors.items():
            shape = tensor.shape[:1]
            batch_size = shape if batch_size is None else batch_size
            assert len(shape) == 1 and shape == batch_size, (
                f"'{key}' begins with dimensions {list(shape)}, '{next(iter(tensors))}' with {list(batch_size)}; "
                "the first must be the same"
            )

        return cls(
            batch=None if batch_size is None else TensorDict(dict(tensors), batch_size=batch_size),
            non_tensor_batch={key: _object_rows(rows) for key, rows in (non_tensors or {}).items()},
            meta_info=dict(meta_info or {}),
        )

    @classmethod
    def from_single_dict(
        cls, data: Mapping[str, torch.Tensor | np.ndarray], meta_info: dict[str, Any] | None = None
    ) -> DataProto:
        """Build from one dict, as a collate function returns it, sorting tensors from object arrays.

        Raises ValueError for a value that is neither.
        """
        for key, value in data.items():
            if not isinstance(value, (torch.Tensor, np.ndarray)):
                raise ValueError(f"'{key}' is a {type(value).__name__}; it must be a torch.Tensor or a numpy array")

        return cls.from_dict(
            tensors={key: value for key, value in data.items() if isinstance(value, torch.Tensor)},
            non_tensors={key: value for key, value in data.items() if isinstance(value, np.ndarray)},
            meta_info=meta_info,
        )

    def select(
        self,
        batch_keys: Iterable[str] | None = None,
        non_tensor_batch_keys: Iterable[str] | None = None,
        meta_info_keys: Iterable[str] | None = None,
        deepcopy: bool = False,
    ) -> DataProto:
        """A DataProto with these keys only; None keeps all of a kind. Contents are shared unless `deepcopy`.

        Raises KeyError naming every key that is not there.
        """
        batch = self.batch
        if batch_keys is not None:
            batch_keys = self._known(batch_keys, "batch")
            batch = None if batch is None else batch.select(*batch_keys)
        elif batch is not None:
            batch = batch.copy()

        selected = DataProto(
            batch=batch,
            non_tensor_batch=self._subset("non_tensor_batch", non_tensor_batch_keys),
            meta_info=self._subset("meta_info", meta_info_keys),
        )
        if not deepcopy:
            return selected

        return DataProto(
            batch=None if batch is None else batch.clone(),
            non_tensor_batch=copy.deepcopy(selected.non_tensor_batch),
            meta_info=copy.deepcopy(selected.meta_info),
        )

    def pop(
        self,
        batch_keys: Iterable[str] | None = None,
        non_tensor_batch_keys: Iterable[str] | None = None,
        meta_info_keys: Iterable[str] | None = None,
    ) -> DataProto:
        """Take these keys out of this DataProto and return them as another; None takes nothing of a kind.

        Raises KeyError naming every key that is not there, before anything is taken.
        """
        batch_keys = self._known(batch_keys or (), "batch")
        non_tensor_batch_keys = self._known(non_tensor_batch_keys or (), "non_tensor_batch")
        meta_info_keys = self._known(meta_info_keys or (), "meta_info")
        batch: Any = self.batch  # None only where no key of it is taken
        return DataProto.from_dict(
            tensors={key: batch.pop(key) for key in batch_keys},
            non_tensors={key: self.non_tensor_batch.pop(key) for key in non_tensor_batch_keys},
            meta_info={key: self.meta_info.pop(key) for key in meta_info_keys},
        )

    def union(self, other: DataProto) -> DataProto:
        """Add the keys of `other`, which has the same rows in the same order. In place; returns self.

        A key in both must have the same content. Raises ValueError otherwise, or when the lengths differ, before
        anything is added.
        """
        for data in (self, other):
            if (data.batch is not None or data.non_tensor_batch) and len(data) != max(len(self), len(other)):
                raise ValueError(f"a batch of {len(self)} rows has no union with one of {len(other)} rows")

        self._require_equal_where_both(other, "batch", "non_tensor_batch", "meta_info")
        if self.batch is None:
            self.batch = None if other.batch is None else other.batch.copy()
        elif other.batch is not None:
            self.batch.update(other.batch)
        self.non_tensor_batch.update(other.non_tensor_batch)
        self.meta_info.update(other.meta_info)
        return self

    def chunk(self, chunks: int) -> list[DataProto]:
        """Cut into `chunks` parts of equal length, in order. Raises AssertionError when the length does not divide."""
        assert chunks > 0 and len(self) % chunks == 0, (
            f"{len(self)} rows do not divide into {chunks} equal chunks; pad_dataproto_to_divisor makes them"
        )
        return self._cut(len(self) // chunks, chunks)

    def split(self, split_size: int) -> list[DataProto]:
        """Cut into parts of `split_size` rows, in order. Raises AssertionError when the length does not divide."""
        assert split_size > 0 and len(self) % split_size == 0, (
            f"{len(self)} rows do not divide into parts of {split_size}; pad_dataproto_to_divisor makes them"
        )
        return self._cut(split_size, len(self) // split_size)

    @staticmethod
    def concat(data: Sequence[DataProto]) -> DataProto:
        """Join the rows of parts with the same keys, the inverse of `chunk` and `split`.

        Raises ValueError when there is no part, when a key is in some parts only, or when `meta_info` of two parts
        disagree.
        """
        if not data:
            raise ValueError("nothing to concatenate: the list of DataProto is empty")

        first = data[0]
        meta_info = dict(first.meta_info)
        for index, part in enumerate(data[1:], start=1):
            for kind in ("batch", "non_tensor_batch"):
                odd = sorted(first._keys(kind) ^ part._keys(kind))
                if odd:
                    raise ValueError(f"{kind} keys {odd} are in only one of part 0 and part {index}")
            DataProto(meta_info=meta_info)._require_equal_where_both(part, "meta_info")
            meta_info.update(part.meta_info)

        batches: list[Any] = [part.batch for part in data]
        batch: Any = None if first.batch is None else torch.cat(batches)
        return DataProto(
            batch=batch,
            non_tensor_batch={
                key: np.concatenate([part.non_tensor_batch[key] for part in data]) for key in first.non_tensor_batch
            },
            meta_info=meta_info,
        )

    def repeat(self, repeat_times: int, interleave: bool = True) -> DataProto:
        """Every row `repeat_times` times: next to each other (a a b b), or the whole batch in turn (a b a b)."""
        rows = np.arange(len(self))
        return self[rows.repeat(repeat_times) if interleave else np.tile(rows, repeat_times)]

    def reorder(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Put row `indices[i]` at place i, in place. `indices` is a permutation of the rows, else ValueError."""
        index = _as_index(indices)
        if not np.array_equal(np.sort(index), np.arange(len(self))):
            raise ValueError(f"indices must name each of the {len(self)} rows once, got {index.tolist()}")

        reordered = self[index]
        self.batch, self.non_tensor_batch = reordered.batch, reordered.non_tensor_batch

    def to(self, device: torch.device | str) -> DataProto:
        """Move the tensors to a device. In place, as a module's `to`; returns self."""
        if self.batch is not None:
            self.batch = self.batch.to(device)
        return self

    def save_to_disk(self, path: str | os.PathLike) -> None:
        """Write everything to one file (a pickle)."""
        with open(path, "wb") as file:
            pickle.dump(self, file)

    @staticmethod
    def load_from_disk(path: str | os.PathLike) -> DataProto:
        """Read what `save_to_disk` wrote: a pickle, which runs whatever code it names. It trusts the file wholly; load
        none that somebody else could have written. Nothing in this package calls it."""
        with open(path, "rb") as file:
            return pickle.load(file)

    def _keys(self, kind: str) -> set[str]:
        content = getattr(self, kind)
        return set() if content is None else set(content.keys())

    def _known(self, keys: Iterable[str], kind: str) -> list[str]:
        keys = list(keys)
        unknown = [key for key in keys if key not in self._keys(kind)]
        if unknown:
            raise KeyError(f"{kind} has no {unknown}; it has {sorted(self._keys(kind))}")
        return keys

    def _subset(self, kind: str, keys: Iterable[str] | None) -> dict[str, Any]:
        content = getattr(self, kind)
        return dict(content) if keys is None else {key: content[key] for key in self._known(keys, kind)}

    def _require_equal_where_both(self, other: DataProto, *kinds: str) -> None:
        for kind in kinds:
            for key in sorted(self._keys(kind) & other._keys(kind)):
                if not _same(getattr(self, kind)[key], getattr(other, kind)[key]):
                    raise ValueError(f"{kind} key '{key}' is in both with different content; drop or rename one")

    def _cut(self, rows: int, parts: int) -> list[DataProto]:
        return [self[part * rows : (part + 1) * rows] for part in range(parts)]


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """Append leading rows, cycling when there are too few, until `size_divisor` divides the length.

    Returns the padded data and how many rows were added. Raises ValueError for an empty batch.
    """
    if len(data) == 0:
        raise ValueError("a batch of 0 rows has nothing to pad with")

    pad_size = -len(data) % size_divisor
    return data[np.arange(len(data) + pad_size) % len(data)], pad_size


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """Drop the `pad_size` rows that `pad_dataproto_to_divisor` appended."""
    return data[: len(data) - pad_size]


def _object_rows(rows: Sequence | np.ndarray) -> np.ndarray:
    if isinstance(rows, np.ndarray) and rows.dtype == object and rows.ndim == 1:
        return rows

    # Row by row, because np.array(rows, dtype=object) makes a matrix of rows that happen to be equally long.
    objects = np.empty(len(rows), dtype=object)
    for index, row in enumerate(rows):
        objects[index] = row
    return objects


def _as_index(rows: Sequence | np.ndarray | torch.Tensor) -> np.ndarray:
    index = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
    return index.astype(np.int64) if index.size == 0 else index


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _same(left: Any, right: Any) -> bool:
    """Equal through and through; NaN equals NaN."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        return bool(((left == right) | (left.isnan() & right.isnan())).all())
    if isinstance(left, np.ndarray):
        return left.shape == right.shape and all(map(_same, left.ravel().tolist(), right.ravel().tolist()))
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    return bool(left == right)
