# SPDX-License-Identifier: Apache-2.0
"""Calls a user's function, plain or `async def`, within a time limit, and a second time if it fails.

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
"""Seconds between the two calls, so that an overloaded server can recover."""

CANCEL_SECONDS = 2.0
"""Seconds for cancelled calls to end."""

ALARM_REPEAT_SECONDS = 1.0
"""Seconds after which a function that catches everything is interrupted again."""


Watch = Callable[[str, float], AbstractContextManager[None]]
"""Takes a call's description and its time limit in seconds; another process makes sure that the call ends."""


def unwatched(samples: str, limit_s: float) -> AbstractContextManager[None]:
    """The `Watch` of a process without a supervisor."""
    return nullcontext()


class CallFailed(Exception):
    """The function raised or took too long; its exception is the cause.

    `index` is the argument's index among several, None if unknown. `first` is the exception of the first of two calls.
    """

    def __init__(self, index: int | None = None, first: BaseException | None = None) -> None:
        super().__init__(index)
        self.index = index
        self.first = first


class _IsAsync(Exception):
    """The function returned an awaitable, though it is not `async def`."""


def longest_seconds(timeout_s: float, num_samples: int) -> float:
    """Longest total time of the calls for a batch: two per sample, or one call and repeated halves of it."""
    return (2 * num_samples + 2) * (timeout_s + RETRY_PAUSE_SECONDS)


class OutOfTime(BaseException):
    """The time limit is over. Not an `Exception`, so that `except Exception` in the function does not catch it."""


@dataclass
class Answers:
    """The results of several calls."""

    results: list[Any]
    """Results in the order of the arguments."""
    failures: dict[int, BaseException] = field(default_factory=dict)
    """Exceptions of first calls, by argument index, whose second call succeeded."""


class Calls:
    """Applies a function to arguments, one per call.

    Args:
        function: takes one positional argument. A returned iterator is consumed within the call, and a returned
            awaitable is awaited.
        copy: copies the argument for each call, so that the function cannot change the original.
        timeout_s: time limit of a call in seconds; None for no limit. Uses SIGALRM.
        max_concurrency: number of calls of an `async def` function that run together.
        watch: guards every call with a limit, in case no signal can interrupt it.
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
            samples: describes the call in messages.

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
        """One call per argument, and a second call for each that failed.

        Args:
            samples: describes the call of an argument, by its index, in messages; None stands for all calls.

        Raises:
            CallFailed: a call failed twice. Later calls may not have been made.
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
        except BaseException as error:  # sys.exit counts as a failure too
            raise CallFailed(index) from error

    # ---- async functions ----

    def _run(self, work: Any, samples: Callable[[], str], rounds: int) -> Any:
        """Awaits `work` in one event loop for all batches, since clients in the user's module are bound to a loop.

        Args:
            samples: describes the work in messages.
            rounds: the total time limit, in multiples of `timeout_s`. A call that blocks the loop also blocks its
                own time limit.
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
        """Cancels unfinished calls and closes the loop; the next call gets a new one."""
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
        """Raises OutOfTime in the block after `seconds`, and watches the block; None sets no limit."""
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
    """Raises OutOfTime in the block after `seconds`."""
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"{TIMEOUT_KEY} is held by a signal, which only the main thread gets: score there")

    is_over = False

    def interrupt(*_: Any) -> None:
        nonlocal is_over
        is_over = True
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, interrupt)
    # A thread would not work: code that hangs may hold the interpreter's lock, as a regular expression does.
    signal.setitimer(signal.ITIMER_REAL, seconds, ALARM_REPEAT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if is_over:  # the block caught it, or left by its own `return`
        raise OutOfTime


def _collected(result: Any) -> Any:
    """The result with lists in place of other iterables, also for columns."""
    if isinstance(result, Mapping):
        return {key: list(value) if isinstance(value, Iterator) else value for key, value in result.items()}
    is_whole = isinstance(result, (str, bytes, list, tuple)) or hasattr(result, "ndim")
    return list(result) if isinstance(result, Iterable) and not is_whole else result
