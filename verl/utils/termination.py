# SPDX-License-Identifier: Apache-2.0
"""Lets only the driver react to SIGTERM, since it decides how the run ends.

`timeout` and a shell's `kill %1` signal a whole process group, and Slurm every process of a job: workers would end
before their state is saved.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDED_BY_SIGTERM = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM ended, as a shell reports it."""


@contextmanager
def block_sigterm_in_children() -> Iterator[None]:
    """Processes that are started inside never get SIGTERM unless they unblock it; SIGKILL ends them.

    Afterwards this process's handler is restored, since libraries replace it: Ray does so in drivers.

    Raises:
        SystemExit: a library's handler ended the program inside; the code is `ENDED_BY_SIGTERM`.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a mask is inherited
    try:
        yield
    except SystemExit:  # another thread got the signal, since only this one blocks it
        raise SystemExit(ENDED_BY_SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def ignore_sigterm() -> None:
    """Makes this process ignore SIGTERM, if called in its main thread. Programs that it starts do not ignore it."""
    if threading.current_thread() is not threading.main_thread():
        return
    # Child programs inherit SIG_IGN and a blocked signal, but not an empty handler and an open mask.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
