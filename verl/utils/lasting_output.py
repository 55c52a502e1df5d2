# SPDX-License-Identifier: Apache-2.0
"""Standard output and error that survive the loss of their reader: the program goes on, only the output is lost.

A pipe loses its reader as in `... | head`, a terminal when its window closes.
"""

import errno
import io
import os
import sys

READER_GONE = (errno.EPIPE, errno.EIO)
"""The errors of a pipe and of a terminal without a reader."""


class LastingFile(io.FileIO):
    """A file whose descriptor is redirected to the null device, for all writers, once its reader is gone."""

    def write(self, data: bytes | memoryview) -> int | None:
        """As `io.FileIO.write`; without a reader the data counts as written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes


def survive_lost_readers() -> None:
    """Replaces `sys.stdout` and `sys.stderr` by streams over `LastingFile`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the program began
            continue
        stream.flush()
        file = io.BufferedWriter(LastingFile(stream.fileno(), "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True))
