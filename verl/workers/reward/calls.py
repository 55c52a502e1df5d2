# SPDX-License-Identifier: Apache-2.0
"""Calls a user's function: plain or `async def`, within a time limit, and once more where it fails.

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)

TIMEOUT_KEY = "worker.reward.timeout_s"

RETRY_PAUSE_SECONDS = 1.0
"""Between the two calls; a server that turned one away has a moment."""

CANCEL_SECONDS = 2.0
"""For calls to end that are cancelled."""

ALARM_REPEAT_SECONDS = 1.0
"""A function that catches everything is interrupted again."""


Watch = Callable[[str, float], AbstractContextManager[None]]
"""Given what a call is about and its time limit in seconds: somebody outside of this process looks that it ends."""


def unwatched(samples: str, limit_s: float) -> AbstractContextManager[None]:
    """The `Watch` of a process that nobody looks after."""
    return nullcontext()


class CallFailed(Exception):
    """The function raised or took too long; what it raised is the cause.

    `index` is the argument's among several, None where it is not known. `first` is what the first of two calls raised.
    """

    def __init__(self, index: int | None = None, first: BaseException | None = None) -> None:
        super().__init__(index)
        self.index = index
        self.first = first


class _IsAsync(Exception):
    """The function returned something to await, though it is not declared so."""


def longest_seconds(timeout_s: float, num_samples: int) -> float:
    """What the calls for a batch may take together: one for each sample, each made twice, or one and its halves."""
    return (2 * num_samples + 2) * (timeout_s + RETRY_PAUSE_SECONDS)


class OutOfTime(BaseException):
    """No `Exception`, so that `except Exception` in the function does not keep it."""


@dataclass
class Answers:
    """What several calls gave."""

    results: list[Any]
    """In the order of the arguments."""
    failures: dict[int, BaseException] = field(default_factory=dict)
    """What the first call raised, by argument, where the second one gave the result."""


class Calls:
    """Applies a function to arguments, one a call.

    Args:
        function: of one positional argument. What it returns to iterate over is run to its end within the call, what
            it returns to await is awaited.
        copy: makes the argument of a call, lest the function changes what the next call and errors show.
        timeout_s: seconds that a call may take; None for no limit. SIGALRM keeps the time.
        max_concurrency: how many calls of an `async def` function run together.
        watch: for what no signal can interrupt; told of every call that has a limit.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        copy: Callable[[Any], Any],
        timeout_s: float | None,
        max_concurrency: int,
        watch: Watch = unwatched,
    ) -> None:
        self._function = function
        self._copy = copy
        self._timeout_s = timeout_s
        self._max_concurrency = max_concurrency
        self._watch = watch
        self._is_async = inspect.iscoroutinefunction(function)
        self._runner: asyncio.Runner | None = None

    def once(self, argument: Any, samples: Callable[[], str]) -> Any:
        """The result of one call.

        Args:
            samples: what the call is about, for messages.

        Raises:
            CallFailed: it failed.
        """
        if not self._is_async:
            try:
                return self._once(0, argument, samples)
            except _IsAsync:
                self._is_async = True
        return self._run(self._once_async(0, argument), samples, rounds=1)

    def each(self, arguments: Sequence[Any], samples: Callable[[int | None], str]) -> Answers:
        """One call for each argument, and a second one for those whose first failed.

        Args:
            samples: what the call of an argument, given by its index, is about, for messages; given None, all calls.

        Raises:
            CallFailed: a call failed twice. Others may not have been made.
        """
        if not self._is_async:
            answers = Answers([])
            try:
                for index, argument in enumerate(arguments):
                    answers.results.append(self._twice(index, argument, partial(samples, index), answers.failures))
                return answers
            except _IsAsync:
                self._is_async = True
        rounds = 2 * math.ceil(len(arguments) / self._max_concurrency)
        return self._run(self._each_async(arguments), partial(samples, None), rounds)

    # ---- plain functions ----

    def _twice(self, index: int, argument: Any, samples: Callable[[], str], failures: dict[int, BaseException]) -> Any:
        try:
            return self._once(index, argument, samples)
        except CallFailed as failure:
            failures[index] = failure.__cause__
        time.sleep(RETRY_PAUSE_SECONDS)
        try:
            return self._once(index, argument, samples)
        except CallFailed as failure:
            raise CallFailed(index, failures[index]) from failure.__cause__

    def _once(self, index: int, argument: Any, samples: Callable[[], str]) -> Any:
        try:
            with self._limited(self._timeout_s, samples):
                result = self._function(self._copy(argument))
                if inspect.iscoroutine(result):
                    result.close()
                if inspect.isawaitable(result):
                    raise _IsAsync
                return _collected(result)
        except (KeyboardInterrupt, _IsAsync):
            raise
        except OutOfTime:
            raise CallFailed(index) from self._timeout_error()
        except BaseException as error:  # sys.exit, too, is the function's failure
            raise CallFailed(index) from error

    # ---- async functions ----

    def _run(self, work: Any, samples: Callable[[], str], rounds: int) -> Any:
        """Awaits `work` in one event loop for all batches, which clients that live in the user's module keep to.

        Args:
            samples: what it is about.
            rounds: how many time limits it may take in all. A call that blocks the loop stops its own clock too.
        """
        if self._runner is None:
            self._runner = asyncio.Runner()
        limit = None if self._timeout_s is None else (rounds + 1) * (self._timeout_s + RETRY_PAUSE_SECONDS)
        try:
            with self._limited(limit, samples):
                return self._runner.run(work)
        except (KeyboardInterrupt, CallFailed):
            raise
        except OutOfTime:
            self._end_loop()
            raise CallFailed from self._blocked_error()
        except BaseException as error:  # sys.exit in a task that the function began goes through the loop
            self._end_loop()
            raise CallFailed from error

    def _end_loop(self) -> None:
        """Cancels the calls that have not ended, as far as they let themselves; the next one gets another loop."""
        runner, self._runner = self._runner, None
        try:
            with _interrupted_after(CANCEL_SECONDS):
                runner.close()
        except OutOfTime:
            logger.warning("calls of the reward function do not end when they are cancelled")

    async def _each_async(self, arguments: Sequence[Any]) -> Answers:
        places = asyncio.Semaphore(self._max_concurrency)
        failures: dict[int, BaseException] = {}

        async def answer(index: int, argument: Any) -> Any:
            async with places:
                return await self._twice_async(index, argument, failures)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(index, argument)) for index, argument in enumerate(arguments)]
        except BaseExceptionGroup as group:
            failed = [error for error in group.exceptions if isinstance(error, CallFailed)]
            if not failed:
                raise CallFailed from group.exceptions[0]
            first = min(failed, key=lambda failure: failure.index)
            raise first from first.__cause__
        return Answers([task.result() for task in tasks], failures)

    async def _twice_async(self, index: int, argument: Any, failures: dict[int, BaseException]) -> Any:
        try:
            return await self._once_async(index, argument)
        except CallFailed as failure:
            failures[index] = failure.__cause__
        await asyncio.sleep(RETRY_PAUSE_SECONDS)
        try:
            return await self._once_async(index, argument)
        except CallFailed as failure:
            raise CallFailed(index, failures[index]) from failure.__cause__

    async def _once_async(self, index: int, argument: Any) -> Any:
        clock = asyncio.timeout(self._timeout_s)
        try:
            async with clock:
                return _collected(await self._function(self._copy(argument)))
        except KeyboardInterrupt:
            raise
        except OutOfTime:
            raise CallFailed(index) from self._blocked_error()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():
                raise  # another call has failed for good
            raise CallFailed(index) from (self._timeout_error() if clock.expired() else error)

    @contextmanager
    def _limited(self, seconds: float | None, samples: Callable[[], str]) -> Iterator[None]:
        """Raises OutOfTime in the block when it takes longer, and has it watched; None lets it take any time."""
        if seconds is None:
            yield
            return
        with self._watch(samples(), seconds), _interrupted_after(seconds):
            yield

    def _timeout_error(self) -> TimeoutError:
        return TimeoutError(f"the call took longer than {TIMEOUT_KEY}={self._timeout_s:g}")

    def _blocked_error(self) -> TimeoutError:
        return TimeoutError(
            f"the calls took longer than {TIMEOUT_KEY}={self._timeout_s:g} allows together; an async function must "
            "await what takes time: one that blocks (time.sleep, requests) holds up all its calls"
        )


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block when it takes longer."""
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"{TIMEOUT_KEY} is held by a signal, which only the main thread gets: score there")

    is_over = False

    def interrupt(*_: Any) -> None:
        nonlocal is_over
        is_over = True
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, interrupt)
    # A thread would not do: what hangs may hold the interpreter's lock, as a regular expression does.
    signal.setitimer(signal.ITIMER_REAL, seconds, ALARM_REPEAT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if is_over:  # and the block caught it, or left by a `return` of its own
        raise OutOfTime


def _collected(result: Any) -> Any:
    """A result with what is made on the way made: lists in the place of other iterables, also as columns."""
    if isinstance(result, Mapping):
        return {key: list(value) if isinstance(value, Iterator) else value for key, value in result.items()}
    is_whole = isinstance(result, (str, bytes, list, tuple)) or hasattr(result, "ndim")
    return list(result) if isinstance(result, Iterable) and not is_whole else result
