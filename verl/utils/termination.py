# SPDX-License-Identifier: Apache-2.0
"""Lets only the driver react to SIGTERM, since it decides how the run ends.

`timeout` and a shell's `kill %1` signal a whole process group, and Slurm every process of a job: workers would end
before their state is saved.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDED_BY_SIGTERM = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM ended, as a shell reports it."""

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
"""What a user, a shell or Slurm sends to end a run."""


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


@contextmanager
def hold_stop_signals() -> Iterator[None]:
    """Inside, this thread gets no `STOP_SIGNALS`, and processes that it starts get none before they unblock them.

    A process has its parent's handlers until it sets its own, and would answer for its parent in between.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_only(parent: int) -> None:
    """Makes this process ignore SIGINT, and SIGTERM unless its parent sends it: then it ends at once with exit code 0.

    multiprocessing ends its processes by SIGTERM. Where the system does not tell who sent a signal, as on macOS, every
    SIGTERM counts as the parent's. Call this before the process has other threads, since each thread inherits the mask
    of the one that starts it.

    Args:
        parent: the parent's process id.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return
    # A handler is not told who sent a signal. A thread that waits for a blocked signal is.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_at_request_of, args=(parent,), name="stop signals", daemon=True).start()


def _end_at_request_of(parent: int) -> None:
    while True:
        request = signal.sigwaitinfo(STOP_SIGNALS)
        if request.si_signo == signal.SIGTERM and request.si_pid == parent:
            os._exit(0)  # another code would make torch raise an error in the parent
