# SPDX-License-Identifier: Apache-2.0
"""What can be known of the data before anything heavy is loaded: its columns and its number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from verl.config import cut
from verl.trainer.config import DataConfig, data_sources


class Header(NamedTuple):
    """What a file says of itself."""

    columns: list[str]
    num_rows: int


def check_headers(config: DataConfig) -> None:
    """Refuses local Parquet files that lack a column, or have fewer rows in all than a batch.

    Other files, folders and hub data sets are checked when they are loaded; so is one whose header cannot be read.

    Raises:
        ValueError: as `require_columns` and `require_full_batch`.
    """
    headers: list[Header | None] = []
    for key in ("train_files", "val_files"):
        of_key = [(source.path, _header(source.path)) for source in data_sources(getattr(config, key))]
        for path, header in of_key:
            if header is not None:
                require_columns(header.columns, path, config)
        headers = headers or [header for _, header in of_key]
    if None not in headers:
        num_rows = sum(header.num_rows for header in headers)
        require_full_batch(num_rows, config.mini_rollout_batch_size or config.rollout_batch_size)


def require_columns(columns: Sequence[str], data_path: str, config: DataConfig) -> None:
    """Raise unless there are the columns of prompts and answers.

    Raises:
        ValueError: naming the key and the columns that there are.
    """
    for option in ("prompt_key", "answer_key"):
        column = getattr(config, option)
        if column not in columns:
            there = cut(", ".join(columns), 200)
            raise ValueError(f"data.{option}={column} is no column of {cut(data_path)!r}; it has {there}")


def require_full_batch(num_prompts: int, batch_size: int) -> None:
    """Raise unless a training set makes a batch.

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
    """Of a local Parquet file; None of anything else."""
    import pyarrow as pa  # a quarter of a second, which `--help` does not wait for
    import pyarrow.parquet as pq

    file = Path(path).expanduser()
    if file.suffix != ".parquet" or not file.is_file():
        return None
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError):
        return None
    return Header(metadata.schema.to_arrow_schema().names, metadata.num_rows)
