# SPDX-License-Identifier: Apache-2.0
"""Checks columns and number of rows of the data before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from verl.config import cut
from verl.trainer.config import DataConfig, data_sources


class Header(NamedTuple):
    """Columns and number of rows of a file."""

    columns: list[str]
    num_rows: int


def check_headers(config: DataConfig) -> None:
    """Refuses local Parquet files that lack a column, or have fewer rows in all than a batch.

    Other files, folders, hub datasets and unreadable headers are checked when the data is loaded.

    Raises:
        ValueError: as in `require_columns` and `require_full_batch`.
    """
    headers: list[Header | None] = []
    for key in ("train_files", "val_files"):
        key_headers = [(source.path, _header(source.path)) for source in data_sources(getattr(config, key))]
        for path, header in key_headers:
            if header is not None:
                require_columns(header.columns, path, config)
        headers = headers or [header for _, header in key_headers]
    if None not in headers:
        num_rows = sum(header.num_rows for header in headers)
        require_full_batch(num_rows, config.mini_rollout_batch_size or config.rollout_batch_size)


def require_columns(columns: Sequence[str], data_path: str, config: DataConfig) -> None:
    """Raise unless the columns of prompts and answers exist.

    Raises:
        ValueError: a column is missing; the message names the key and the existing columns.
    """
    for option in ("prompt_key", "answer_key"):
        column = getattr(config, option)
        if column not in columns:
            there = cut(", ".join(columns), 200)
            raise ValueError(f"data.{option}={column} is no column of {cut(data_path)!r}; it has {there}")


def require_full_batch(num_prompts: int, batch_size: int) -> None:
    """Raise unless a training set fills a batch.

    Raises:
        ValueError: it has fewer prompts.
    """
    if num_prompts < batch_size:
        raise ValueError(
            f"the training set has {num_prompts} prompts, fewer than the {batch_size} of one batch; lower "
            "data.rollout_batch_size (or data.mini_rollout_batch_size), or raise data.max_prompt_length if too "
            "many were dropped for their length"
        )


def _header(path: str) -> Header | None:
    """The header of a local Parquet file; None for anything else."""
    import pyarrow as pa  # takes a quarter of a second, so `--help` does not import it
    import pyarrow.parquet as pq

    file = Path(path).expanduser()
    if file.suffix != ".parquet" or not file.is_file():
        return None
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError):
        return None
    return Header(metadata.schema.to_arrow_schema().names, metadata.num_rows)
