# SPDX-License-Identifier: Apache-2.0
"""How a run is asked to end: SIGTERM or Ctrl-C, once to finish the step and save it, twice to end at once."""

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
"""`timeout` sends SIGTERM to its child and then to the child's group: what comes so soon is no second request."""

UNWIND_SECONDS = 10
"""What a run that ends at once may take to close its loggers and end its processes."""


class StopRequest:
    """True once the run was asked to end. While `listening`, signals are what asks.

    The first SIGTERM or SIGINT, once there are steps to finish, only sets the flag. A second one, or the first before
    `let_steps_finish`, raises SystemExit(143) or KeyboardInterrupt in the main thread, and so does the end of the
    grace period; a process that is still there `UNWIND_SECONDS` later, or is signalled a third time, ends then and
    there. SIGHUP, as from a closed terminal, is ignored, and the run goes on as under `nohup`.

    Args:
        grace_s: seconds from the first request to the end of the run, done or not.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._requests = 0
        self._last_term = -math.inf
        self._waits_for_step = False
        self._timers: list[threading.Timer] = []

    def __bool__(self) -> bool:
        return self._requests > 0

    def let_steps_finish(self) -> None:
        """From here on there is work to save, and a first request waits for it."""
        self._waits_for_step = True

    def end_at_once(self) -> None:
        """From here on there is none, as while the run loads."""
        self._waits_for_step = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes signals inside; the handlers from before stand again afterwards.

        Outside the main thread of a program there are no handlers to set, and nothing is heard.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {signal.SIGTERM: self._hear, signal.SIGINT: self._hear, signal.SIGHUP: signal.SIG_IGN}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for timer in self._timers:
                timer.cancel()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's

    def _hear(self, number: int, _: FrameType | None) -> None:
        now, before = time.monotonic(), self._last_term
        if number == signal.SIGTERM:
            self._last_term = now
            if now - before < ECHO_SECONDS:
                return
        self._requests += 1
        name, code = signal.Signals(number).name, 128 + number
        if self._requests == 1 and self._waits_for_step:
            _say(
                f"{name}: finishing the step and saving, for up to trainer.grace_s={self.grace_s:g} s; "
                f"{'press Ctrl-C' if number == signal.SIGINT else 'send it'} again to end at once"
            )
            self._later(self.grace_s, self._end_of_grace)
            return
        if self._requests > 2:
            os._exit(code)
        self._requests = 2
        _say(f"{name}: ending at once, with what was saved before")
        self._later(UNWIND_SECONDS, os._exit, code)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    def _end_of_grace(self) -> None:
        _say(f"the step was not done after trainer.grace_s={self.grace_s:g} s")
        self._later(UNWIND_SECONDS, os._exit, ENDED_BY_SIGTERM)  # for a main thread that hangs outside of Python
        self._last_term = -math.inf
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread alone can be interrupted, and by a signal alone

    def _later(self, seconds: float, action: Callable[..., None], *args: int) -> None:
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), action, args)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def _say(text: str) -> None:
    # A handler may interrupt a write to the same stream, whose buffer is then not to be touched.
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
