# SPDX-License-Identifier: Apache-2.0
"""Waits for results of other processes, and logs every minute what it waits for and since when."""

import logging
import time
from collections.abc import Callable, Sequence

import ray

logger = logging.getLogger(__name__)

REPORT_SECONDS = 60.0
"""Seconds between two log lines about the same wait."""


class Waiting:
    """One wait; its clock starts when the object is created.

    Args:
        describe: takes the references without a result; returns what is awaited, in words.
        limit_s: longest wait in seconds; None for no limit.
    """

    def __init__(self, describe: Callable[[Sequence[ray.ObjectRef]], str], limit_s: float | None = None) -> None:
        self._describe = describe
        self._clock = time.strftime("%H:%M:%S")
        self._began = time.monotonic()
        self._end = None if limit_s is None else self._began + limit_s
        self._next_report = self._began + REPORT_SECONDS

    def first(self, references: Sequence[ray.ObjectRef]) -> tuple[ray.ObjectRef, list[ray.ObjectRef]]:
        """The first reference with a result, which may be an error, and the others.

        Raises:
            TimeoutError: the wait took longer than its limit.
        """
        while True:
            wake = self._next_report if self._end is None else min(self._next_report, self._end)
            ready, others = ray.wait(references, num_returns=1, timeout=max(0.0, wake - time.monotonic()))
            if ready:
                return ready[0], others
            now = time.monotonic()
            if self._end is not None and now >= self._end:
                raise TimeoutError(
                    f"no answer came within {now - self._began:.0f} s from {self._describe(references)}"
                )
            if now >= self._next_report:
                self._next_report = now + REPORT_SECONDS
                logger.info(
                    "still waiting, since %s (%.0f s), for %s",
                    self._clock,
                    now - self._began,
                    self._describe(references),
                )
