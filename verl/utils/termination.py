# SPDX-License-Identifier: Apache-2.0
"""Keeps SIGTERM, which asks a whole run to end, with the process that decides how it ends.

`timeout` and a shell's `kill %1` send the signal to a process group, and Slurm to every process of a job: those that
compute would be gone before their work is saved.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDED_BY_SIGTERM = 128 + signal.SIGTERM
"""The exit code that a shell gives for a process that SIGTERM ended."""


@contextmanager
def termination_kept_from_children() -> Iterator[None]:
    """Processes that are started inside never see SIGTERM, unless they ask for it; SIGKILL ends them.

    This process' own handler stands again afterwards, since libraries put theirs in its place: Ray does, in drivers.

    Raises:
        SystemExit: with `ENDED_BY_SIGTERM`, when such a handler of a library ended the program inside.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a mask is inherited
    try:
        yield
    except SystemExit:  # another thread was given the signal, since the mask is this one's
        raise SystemExit(ENDED_BY_SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def leave_termination_to_the_driver() -> None:
    """Has this process outlive SIGTERM, where its main thread says so. Programs that it starts end by it as ever."""
    if threading.current_thread() is not threading.main_thread():
        return
    # A handler that does nothing and an open mask are not handed on; SIG_IGN and a closed one would be.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
