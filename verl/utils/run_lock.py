# SPDX-License-Identifier: Apache-2.0
"""A lock for one run per folder: two runs would cut each other's logs and remove each other's checkpoints."""

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
"""Lock file in the run's folder. It is never removed: a run holds a lock on the file."""


FLOCK = "hhqqi0q"
"""Linux's `struct flock`: type, whence, start, length, process."""


class FolderRefused(ValueError):
    """The run cannot use the folder."""


class FolderInUse(FolderRefused):
    """Another run uses the folder."""


@contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """Inside, no other run can use `folder`, which is created if it is missing.

    The kernel releases the lock when this process ends for any reason. Unlike a lock of `flock`, forked processes do
    not hold it. It also works between machines, on file systems with locks (NFS unless mounted with `nolock`); on
    others there is no lock, and a warning says so.

    Raises:
        FolderInUse: another run uses it; the message names the folder, the process and the host.
        FolderRefused: the folder cannot be created or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(Path(folder, LOCK_FILE), "a+", encoding="utf-8")
    except OSError as error:
        raise FolderRefused(
            f"trainer.save_checkpoint_path={folder} cannot be written to ({error.strerror}: {error.filename}); name a "
            "folder that this user may make and write to"
        ) from None
    # Closing the file anywhere in this process, even if opened elsewhere, releases the lock.
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
    """Raise if another process holds the lock of `folder`; takes no lock and creates no file.

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
