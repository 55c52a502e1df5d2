# SPDX-License-Identifier: Apache-2.0
"""One run a folder: two in the same one would cut each other's logs and remove each other's checkpoints."""

import errno
import fcntl
import json
import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
"""In the run's folder, where it stays: the lock is on the file, and not that there is one."""


FLOCK = "hhqqi0q"
"""Linux' `struct flock`: kind of lock, whence, start, length, process."""


class FolderRefused(ValueError):
    """The run cannot have the folder."""


class FolderInUse(FolderRefused):
    """Another run has it."""


@contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """Keeps other runs out of `folder`, which is made if it is missing.

    The kernel gives the folder free when this process ends, however it does: the lock is the process' alone, and not,
    as one of `flock`, also held by what it forks. It holds between machines too, on file systems that have locks (NFS
    unless it is mounted with `nolock`); on others a warning says that there is none.

    Raises:
        FolderInUse: naming the folder, and the process and the host that have it.
        FolderRefused: the folder cannot be made or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(Path(folder, LOCK_FILE), "a+", encoding="utf-8")
    except OSError as error:
        raise FolderRefused(
            f"trainer.save_checkpoint_path={folder} cannot be written to ({error.strerror}: {error.filename}); name a "
            "folder that this user may make and write to"
        ) from None
    # Whoever in this process closes the file, opened here or elsewhere, gives the lock up.
    with lock as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(folder, file) from None
            logger.warning("%s cannot be locked (%s): see to it that no other run uses it", folder, error.strerror)
        else:
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        yield


def require_free_folder(folder: str) -> None:
    """Raise where another process holds the lock of `folder`; takes no lock and makes no file.

    Raises:
        FolderInUse: as `locked_folder` does.
    """
    path = Path(folder, LOCK_FILE)
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        if struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK:
            raise _in_use(folder, file)


def _in_use(folder: str, file: TextIO) -> FolderInUse:
    return FolderInUse(
        f"trainer.save_checkpoint_path={folder} is in use by another run, {_owner(file)}: end it or wait "
        "for its end, or give this run a folder of its own"
    )


def _owner(file: TextIO) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except json.JSONDecodeError:  # it is writing
        return "which has just started"
    return f"process {owner['pid']} on {owner['host']}"
