# SPDX-License-Identifier: Apache-2.0
"""Writes files safely to disk, and names the file if writing fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GIBIBYTE, MEBIBYTE = 2**30, 2**20


def write_json(path: str | os.PathLike[str], content: Any, private: bool = False) -> None:
    """Writes JSON with `write_text`.

    Args:
        private: nobody but its owner can read it (mode 0600).

    Raises:
        RuntimeError: it could not be written.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False), private)


def write_text(path: str | os.PathLike[str], text: str, private: bool = False) -> None:
    """Writes a file atomically: a reader sees the old content or the new one.

    Args:
        private: nobody but its owner can read it (mode 0600).

    Raises:
        RuntimeError: it could not be written.
    """
    unfinished = f"{os.fspath(path)}.tmp"
    with naming_write_errors(path):
        with open(unfinished, "w", encoding="utf-8") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


@contextmanager
def naming_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, errors of writing become a RuntimeError that names the file and the free space.

    Raises:
        RuntimeError: in place of an OSError, or of torch's RuntimeError, which does not name the file.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise RuntimeError(
            f"{path} could not be written ({reason}; its file system has {_size(free)} free). What was saved before "
            "is whole: started again, with room to write, the run goes on from its last checkpoint, if it has one"
        ) from error


def flush_all(folder: str | os.PathLike[str]) -> None:
    """`flush` for a folder and its content."""
    for path in (Path(folder), *Path(folder).rglob("*")):
        flush(path)


def flush(path: str | os.PathLike[str]) -> None:
    """Forces a file or folder to disk (`fsync`)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def require_room(folder: str, num_bytes: int) -> None:
    """Raise unless the file system of `folder`, whose parent exists, has `num_bytes` free.

    Raises:
        RuntimeError: there is less; the message names the folder, the needed and the free space.
    """
    free = shutil.disk_usage(os.path.dirname(folder)).free
    if free < num_bytes:
        raise RuntimeError(
            f"{folder} needs {_size(num_bytes)}, and its file system has {_size(free)} free: nothing was written, and "
            "what was saved before is whole. Make room, or keep fewer with trainer.save_limit, and start the run again"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIBIBYTE:.2f} GiB" if num_bytes >= GIBIBYTE else f"{num_bytes / MEBIBYTE:.1f} MiB"
