# SPDX-License-Identifier: Apache-2.0
"""Passes the output of the reward function's process to a file of bounded size, and a part of it to the console.

The supervisor runs this file, which therefore loads only the standard library.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import BinaryIO

CONSOLE_BYTES_PER_MINUTE = 64 * 2**10
"""Enough for one print per sample of a few hundred samples. Further output goes only to the file."""

FILE_BYTES_PER_MINUTE = 32 * 2**20
"""Further lines are dropped and counted."""

FILE_BYTES = 64 * 2**20
"""A file that reaches this size is renamed to `<name>.1` and replaces the earlier one."""

LONGEST_LINE = 64 * 2**10
"""Bytes; longer lines are split."""

CONSOLE_OF_ERRORS = 2

RAY_PREFIXES = (b":actor_name:", b":job_id:", b":task_name:")
"""Prefixes of lines that Ray itself prints into a worker's output."""


class Output:
    """Passes lines on, within the limits.

    Args:
        path: the file to append to; created with its folder at the first line.
        title: written before the first line.
    """

    def __init__(self, path: Path, title: str) -> None:
        self._path = path
        self._title = title
        self._file: BinaryIO | None = None
        self._for_file = _Allowance(FILE_BYTES_PER_MINUTE)
        self._for_console = _Allowance(CONSOLE_BYTES_PER_MINUTE)
        self._dropped = 0
        self._is_broken = False
        self._unfinished: dict[int, bytes] = {}

    def take(self, chunk: bytes, console: int) -> None:
        """Passes on the complete lines of the output.

        Args:
            console: the file descriptor of the console stream for it.
        """
        *lines, rest = (self._unfinished.pop(console, b"") + chunk).split(b"\n")
        while len(rest) > LONGEST_LINE:
            lines.append(rest[:LONGEST_LINE])
            rest = rest[LONGEST_LINE:]
        self._unfinished[console] = rest
        for line in lines:
            self._pass_on(line, console)

    def close(self) -> None:
        """Passes on incomplete lines."""
        for console, line in self._unfinished.items():
            if line:
                self._pass_on(line, console)
        self._write_dropped_count()
        if self._file is not None:
            self._file.close()

    def _pass_on(self, line: bytes, console: int) -> None:
        if line.startswith(RAY_PREFIXES):
            _print(line, console)
            return
        size = len(line) + 1
        if self._for_file.take(size):
            self._write_dropped_count()
            self._write(line)
        else:
            self._dropped += 1
        was_spent = self._for_console.is_spent
        if self._for_console.take(size):
            _print(line, console)
        elif not was_spent:
            limit = f"more than {CONSOLE_BYTES_PER_MINUTE // 2**10} KiB a minute"
            _print(f"the reward function prints {limit}; what follows is in {self._path}".encode(), console)

    def _write(self, line: bytes) -> None:
        if self._is_broken:
            return
        try:
            if self._file is None:
                self._open()
            elif self._file.tell() >= FILE_BYTES:
                self._file.close()
                self._path.replace(f"{self._path}.1")
                self._open()
            self._file.write(line + b"\n")
        except OSError as error:
            self._is_broken = True
            message = (
                f"{self._path} cannot be written ({error.strerror}); what the reward function prints is kept nowhere"
            )
            _print(message.encode(), CONSOLE_OF_ERRORS)

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)
        self._file.write(self._title.encode() + b"\n")

    def _write_dropped_count(self) -> None:
        if self._dropped:
            limit = f"beyond {FILE_BYTES_PER_MINUTE // 2**20} MiB a minute"
            self._write(f"[{self._dropped} lines {limit} were dropped]".encode())
            self._dropped = 0


class _Allowance:
    """A limit of bytes per minute."""

    def __init__(self, bytes_per_minute: int) -> None:
        self._bytes_per_minute = bytes_per_minute
        self._left = bytes_per_minute
        self._next_minute = time.monotonic() + 60
        self.is_spent = False

    def take(self, size: int) -> bool:
        """Whether `size` more bytes may pass. After one refusal, nothing passes until the minute is over."""
        now = time.monotonic()
        if now >= self._next_minute:
            self._left, self._next_minute, self.is_spent = self._bytes_per_minute, now + 60, False
        if self.is_spent or size > self._left:
            self.is_spent = True
            return False
        self._left -= size
        return True


def _print(line: bytes, console: int) -> None:
    try:
        os.write(console, line + b"\n")
    except OSError:
        pass  # the console is gone, for example if Ray's files are on a full disk
