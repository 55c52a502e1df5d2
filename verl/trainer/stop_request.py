# SPDX-License-Identifier: Apache-2.0
"""Ends a run on SIGTERM or Ctrl-C: the first signal finishes and saves the step, the second ends at once."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from verl.utils.termination import ENDED_BY_SIGTERM

ECHO_SECONDS = 1
"""A second signal within this time is the same request: `timeout` signals its child, then the child's group."""

UNWIND_SECONDS = 10
"""Seconds for a run that ends at once to close its loggers and end its processes."""


class StopRequest:
    """True once the run was asked to end, by a signal that arrives inside `listening`.

    The first SIGTERM or SIGINT, once there are steps to finish, only sets the flag. A second one, or the first before
    `let_steps_finish`, raises SystemExit(143) or KeyboardInterrupt in the main thread, and so does the end of the
    grace period; a process that is still there `UNWIND_SECONDS` later, or is signalled a third time, ends then and
    there. SIGHUP, as from a closed terminal, is ignored, and the run goes on as under `nohup`.

    Args:
        grace_s: seconds from the first request to the end of the run, done or not.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._owner = os.getpid()
        self._requests = 0
        self._last_term = -math.inf
        self._waits_for_step = False
        self._timers: list[threading.Timer] = []

    def __bool__(self) -> bool:
        return self._requests > 0

    def let_steps_finish(self) -> None:
        """Call when training begins: from now on a first request lets the current step finish."""
        self._waits_for_step = True

    def end_at_once(self) -> None:
        """Call when there is nothing to save: from now on a first request ends the run at once."""
        self._waits_for_step = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, handles the signals; restores the earlier handlers afterwards.

        Python sets handlers only in the main thread; in other threads this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {signal.SIGTERM: self._handle, signal.SIGINT: self._handle, signal.SIGHUP: signal.SIG_IGN}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for timer in self._timers:
                timer.cancel()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a fork, such as a process that filters rows, has nothing to save or to say
            os._exit(128 + number)
        now, before = time.monotonic(), self._last_term
        if number == signal.SIGTERM:
            self._last_term = now
            if now - before < ECHO_SECONDS:
                return
        self._requests += 1
        name, code = signal.Signals(number).name, 128 + number
        if self._requests == 1 and self._waits_for_step:
            _write_to_stderr(
                f"{name}: finishing the step and saving, for up to trainer.grace_s={self.grace_s:g} s; "
                f"{'press Ctrl-C' if number == signal.SIGINT else 'send it'} again to end at once"
            )
            self._later(self.grace_s, self._on_grace_end)
            return
        if self._requests > 2:
            os._exit(code)
        self._requests = 2
        _write_to_stderr(f"{name}: ending at once, with what was saved before")
        self._later(UNWIND_SECONDS, os._exit, code)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    def _on_grace_end(self) -> None:
        _write_to_stderr(f"the step was not done after trainer.grace_s={self.grace_s:g} s")
        self._later(UNWIND_SECONDS, os._exit, ENDED_BY_SIGTERM)  # in case the main thread hangs in native code
        self._last_term = -math.inf
        os.kill(os.getpid(), signal.SIGTERM)  # only a signal interrupts the main thread

    def _later(self, seconds: float, action: Callable[..., None], *args: int) -> None:
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), action, args)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def _write_to_stderr(text: str) -> None:
    # A handler may interrupt a write to the same stream, whose buffer is then not to be touched.
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
