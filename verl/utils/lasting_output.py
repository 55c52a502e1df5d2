# SPDX-License-Identifier: Apache-2.0
"""Standard output and error that a program outlives: their reader may go, and with it no more than what it would read.

A pipe's reader goes as in `... | head`, a terminal's when its window closes.
"""

import errno
import io
import os
import sys

READER_GONE = (errno.EPIPE, errno.EIO)
"""Of a pipe, and of a terminal."""


class LastingFile(io.FileIO):
    """A descriptor that goes quiet when its reader is gone, for all that write to it: it becomes the null device's."""

    def write(self, data: bytes | memoryview) -> int | None:
        """As `io.FileIO.write`; what nobody reads counts as written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Puts streams over `LastingFile` in the place of `sys.stdout` and `sys.stderr`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the program began
            continue
        stream.flush()
        file = io.BufferedWriter(LastingFile(stream.fileno(), "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True))
