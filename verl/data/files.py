# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of data files, folders and hub datasets, with their values as written."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Json,
    LargeList,
    List,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError

from verl.config import cut, looks_local
from verl.trainer.config import DATA_SUFFIXES, split_data_path

logger = logging.getLogger(__name__)

LARGEST_ROW_GROUP = 2_000_000_000
"""Largest row group in bytes: Arrow cannot read lists of more than 2 GiB at once."""

ROW_GROUP = 256 * 2**20
"""Size in bytes of a row group in the copy of such a file."""


def load_rows(data_path: str) -> Dataset:
    """Load the rows that `data.train_files` or `data.val_files` names.

    Args:
        data_path: a data file, a folder of data files (or of `save_to_disk`), or a dataset id on the hub; then,
            optionally, `@split`, with an optional slice as in `@train[:100]`. The default split is train. The
            `datasets` library assigns the files of a folder to splits by name (`test-00000.parquet`, `test/0.jsonl`);
            if no file is named after a split, all are train.

    Raises:
        ValueError: the data does not exist, or it has no such split or no rows.
    """
    path, split = split_data_path(data_path)
    split = split or "train"
    try:
        rows = _load(path, split)
        _require_utf8(rows)
        return rows
    except (DatasetsError, OSError, ValueError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        reason = cut(f"{error}{cause}", 250) + _remedy(error)
        raise ValueError(f"cannot load the data {cut(data_path)!r}: {reason}") from error


def _remedy(error: BaseException) -> str:
    """What to do about an error of the library; empty if unknown."""
    causes = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    texts = " ".join(map(str, causes))
    if any(isinstance(cause, UnicodeError) for cause in causes) or "UTF8" in texts or "utf-8" in texts:
        return "; its text is not UTF-8: convert it, as by `iconv -f LATIN1 -t UTF-8`"
    if "Nested data conversions" in texts:
        return "; it has a row group above 2 GB: download the files and name their folder, which is read in pieces"
    return ""


def _load(path: str, split: str) -> Dataset:
    local = Path(path).expanduser()
    if local.exists():
        with progress_bars(shown=False):
            if local.is_dir():
                return _load_folder(local, split)
            if local.suffix not in DATA_SUFFIXES:
                raise ValueError(f"{local.name} is none of {', '.join(DATA_SUFFIXES)}")
            return _load_files({"train": [local]}, split)
    if looks_local(path, DATA_SUFFIXES):
        raise FileNotFoundError(f"no such file or folder (looked for {local.absolute()})")
    return _load_from_hub(path, split)


def _require_utf8(rows: Dataset) -> None:
    """Raise unless all texts are valid UTF-8; JSON and Parquet files are loaded without a check."""
    for name in rows.column_names:
        first = 0
        for chunk in rows.data.column(name).chunks:
            try:
                chunk.validate(full=True)
            except pa.ArrowInvalid as error:
                index = re.search(r"UTF8 sequence at string index (\d+)", str(error))
                at = f" in row {first + int(index[1])}" if index and pa.types.is_string(chunk.type) else ""
                raise ValueError(f"column {name}{at}: {error}") from error
            first += len(chunk)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Inside, switches the progress bars of the `datasets` library on or off, for the whole process."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _load_files(files: Mapping[str, Sequence[Path]], split: str) -> Dataset:
    """Load a split from data files of one type, given by split."""
    paths = [path for split_files in files.values() for path in split_files]
    suffixes = {".json" if path.suffix == ".jsonl" else path.suffix for path in paths}
    if len(suffixes) != 1:
        raise ValueError(f"it has files of several types ({', '.join(sorted(suffixes))}); name one of them")
    empty = [path.name for path in paths if path.stat().st_size == 0]
    if empty:
        raise ValueError(f"{', '.join(empty)} is empty")
    builder = suffixes.pop().removeprefix(".")
    if builder == "parquet":
        files = {name: [_with_small_row_groups(path) for path in files[name]] for name in files}
    # The library reads `[`, `*` and `?` as patterns.
    data_files = {name: [glob.escape(str(path)) for path in files[name]] for name in files}
    return _load_as_written(builder, split, path=builder, data_files=data_files)


def _load_as_written(builder: str, split: str, **source: Any) -> Dataset:
    """Load a split with `load_dataset`, with values as they are in the files.

    Args:
        builder: the library's name for the file type.
    """
    rows = load_dataset(split=split, **source)
    if builder == "csv":
        # If it guesses types, pandas turns `007` into 7.0 and `NA` into null. Empty cells are null.
        texts = Features({column: Value("string") for column in rows.column_names})
        return load_dataset(split=split, **source, features=texts, keep_default_na=False, na_values=[""])
    if builder == "json" and (changed := {name for name, feature in rows.features.items() if _is_changed(feature)}):
        features = Features({name: Json() if name in changed else kind for name, kind in rows.features.items()})
        return load_dataset(split=split, **source, features=features)
    return rows


def _is_changed(feature: Any) -> bool:
    """Whether pyarrow may have changed the values of a JSON column.

    It turns texts that look like dates into timestamps, and whole numbers beside other numbers into floats.
    """
    if isinstance(feature, Mapping):
        return any(map(_is_changed, feature.values()))
    if isinstance(feature, (List, LargeList)):
        return _is_changed(feature.feature)
    return isinstance(feature, Value) and feature.dtype.startswith(("timestamp", "date", "time", "duration", "float"))


def _load_folder(folder: Path, split: str) -> Dataset:
    if (folder / "state.json").is_file():
        if split != "train":
            raise ValueError(f"it was saved as one set without splits; leave @{split} out")
        return load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():
        splits: DatasetDict = load_from_disk(str(folder))
        if split not in splits:
            raise ValueError(f"no split {split!r} in it; its splits are {', '.join(splits)}")
        return splits[split]

    base_path = glob.escape(folder.resolve().as_posix())
    split_paths = DataFilesDict.from_patterns(get_data_patterns(base_path), base_path=base_path)
    # Media files that rows refer to are left out; the library already ignores the hub's own files.
    files = {
        name: [Path(path) for path in paths if path.endswith(DATA_SUFFIXES)] for name, paths in split_paths.items()
    }
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        example = next(iter(split_paths.values()))[0]
        raise ValueError(f"no {', '.join(DATA_SUFFIXES)} where its split names lead ({example}); name the data file")
    return _load_files(files, split)


def _load_from_hub(dataset_id: str, split: str) -> Dataset:
    try:
        return _load_as_written(load_dataset_builder(dataset_id).name, split, path=dataset_id)
    except OSError as error:
        raise FileNotFoundError("no such file or folder here, and it cannot be loaded from the hub") from error


def _with_small_row_groups(path: Path) -> Path:
    """The Parquet file itself; if a row group is too large, a copy in the library's cache with smaller ones."""
    try:
        metadata = pq.read_metadata(path)
    except pa.ArrowInvalid:  # damaged; loading it gives a better error
        return path
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max(groups, key=lambda group: group.total_byte_size, default=None)
    if largest is None or largest.total_byte_size <= LARGEST_ROW_GROUP:
        return path
    state = path.stat()
    version = hashlib.sha256(f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()[:16]
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "small_row_groups" / version / path.name
    if not copy.exists():
        logger.info("%s has a row group of %.1f GB: copying it in smaller ones", path, largest.total_byte_size / 1e9)
        rows = max(1, largest.num_rows * ROW_GROUP // largest.total_byte_size)
        _copy_in_row_groups(path, copy, rows)
    return copy


def _copy_in_row_groups(path: Path, copy: Path, rows: int) -> None:
    """Copies a Parquet file with `rows` in each row group. The copy is complete or does not exist."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_suffix(f".{os.getpid()}.part")
    source = pq.ParquetFile(path)
    with pq.ParquetWriter(part, source.schema_arrow) as writer:
        for batch in source.iter_batches(batch_size=rows):
            writer.write_batch(batch, row_group_size=rows)
    part.rename(copy)
