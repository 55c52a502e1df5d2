# SPDX-License-Identifier: Apache-2.0
"""Reads files of `torch.save` as data: reading runs no code from the file.

Such a file is a pickle, which can call any function. torch's restricted reader allows only functions that build
tensors. This module adds types of other parts of a checkpoint: number arrays, for numpy's random state, and sharded
tensors under the names of older torch releases, for checkpoints of EasyR1.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

LONGEST_CAUSE = 150
"""Largest number of characters of torch's message in an error."""

START_OF_ARCHIVE = b"PK\x03\x04"
"""torch.save writes zip archives, which have their table of contents at the end."""


class _NumberType:
    """The numpy.dtype that a file may name: only numbers, since arrays of objects would hold addresses."""

    def __init__(self, code: str, *_flags: bool) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise ValueError(f"an array of type {code!r}, which is not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _NumberArray(np.ndarray):
    """The numpy.ndarray that a file may hold; numpy itself checks the number of bytes against the shape."""

    def __new__(cls) -> _NumberArray:
        return super().__new__(cls, (0,))

    def __setstate__(self, state: tuple) -> None:
        version, shape, number_type, is_fortran, content = state
        super().__setstate__((version, shape, number_type.dtype, is_fortran, content))


def _empty_array(*_arguments: Any) -> _NumberArray:
    return _NumberArray()


_TENSOR_MODULES = ("torch.distributed._tensor", "torch.distributed._tensor.api", "torch.distributed.tensor._api")
_PLACEMENT_MODULES = ("torch.distributed._tensor.placement_types", "torch.distributed.tensor.placement_types")
_SPEC_MODULES = (*_PLACEMENT_MODULES, "torch.distributed.tensor._dtensor_spec")
_MESH_MODULES = ("torch.distributed._tensor.device_mesh", "torch.distributed.device_mesh")

_KNOWN_NAMES = [
    (_NumberType, "numpy.dtype"),
    (_NumberArray, "numpy.ndarray"),
    *((_empty_array, f"{module}.multiarray._reconstruct") for module in ("numpy._core", "numpy.core")),
    *((DTensor, f"{module}.DTensor") for module in _TENSOR_MODULES),
    *((kind, f"{module}.{kind.__name__}") for kind in (Shard, Replicate, Partial) for module in _PLACEMENT_MODULES),
    *((kind, f"{module}.{kind.__name__}") for kind in (DTensorSpec, TensorMeta) for module in _SPEC_MODULES),
    *((DeviceMesh, f"{module}.DeviceMesh") for module in _MESH_MODULES),
]
"""Types that a file may name besides torch's own: pairs of the type used here and the name in the file."""


def load_tensors(path: str | os.PathLike, mmap: bool = False) -> Any:
    """Loads a file of `torch.save` to the CPU: tensors, sharded tensors (DTensor), numbers, texts, and lists, tuples
    and dicts of these.

    Args:
        mmap: maps the tensors instead of reading them; the file must stay as it is while they are used.

    Raises:
        ValueError: the file does not exist, is empty, truncated, damaged or no file of `torch.save`, or contains
            something that could run code. The message names the file and the cause.
    """
    path = Path(path)
    _require_whole(path)
    try:
        with torch.serialization.safe_globals(_KNOWN_NAMES):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} {_cause(error)}") from None  # torch's message advises to run the file's code
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} {_cause(error)}") from error


def _require_whole(path: Path) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise ValueError(f"{path} is not a regular file")
        if status.st_size == 0:
            raise ValueError(f"{path} is empty: writing it was cut off, or the disk was full")
        with path.open("rb") as file:
            is_archive = file.read(len(START_OF_ARCHIVE)) == START_OF_ARCHIVE
        if is_archive and not _has_end_of_archive(path):
            raise ValueError(f"{path} is cut short: its end is missing, so that it was not written or copied whole")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _has_end_of_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # the end exists but is invalid
        return False


def _cause(error: Exception) -> str:
    """The problem with a file in one line, taken from torch's long message."""
    text = str(error)
    if name := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text):
        return f"would run code: it holds the pickled global {name[1]}, and checkpoints are read as data only"
    if "TorchScript" in text:
        return "would run code: it is a TorchScript program, and checkpoints are read as data only"
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    line = reason[1] if reason else text.partition("\n")[0]
    return f"is damaged, or not a file of torch.save ({type(error).__name__}: {line[:LONGEST_CAUSE]})"
