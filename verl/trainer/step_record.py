# SPDX-License-Identifier: Apache-2.0
"""The record of one training step: its metrics and the wall-clock times of its phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean


class StepRecord:
    """Collects the metrics and phase timings of one step, so that phases need no return values for them.

    Args:
        step: the number of the step, as it appears in logs and folder names.
        on_phase: called with the name of every phase that begins, and with the name of the enclosing phase when an
            inner one ends, e.g. to show it in a progress bar.

    Example:
        record = StepRecord(3)
        with record.timed("gen"):
            ...
        record.add({"actor/lr": 1e-6})
        record.metrics  # {"actor/lr": 1e-06, "timing_s/gen": 0.8}
    """

    def __init__(self, step: int, on_phase: Callable[[str], None] | None = None) -> None:
        self.step = step
        self._on_phase = on_phase
        self._values: dict[str, float] = {}
        self._samples: dict[str, list[float]] = {}
        self._timings: dict[str, float] = {}
        self._phases: list[str] = []

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to `timing_s/<phase>`; a phase that is entered twice has the sum."""
        self._phases.append(phase)
        self._announce_phase()
        start = time.perf_counter()
        yield
        self._timings[phase] = self._timings.get(phase, 0.0) + time.perf_counter() - start
        self._phases.pop()
        self._announce_phase()

    def add(self, metrics: Mapping[str, float]) -> None:
        """Records numbers (Python, numpy or one-element tensors) under names of the form `area/name`.

        Raises:
            ValueError: a name is recorded already; the second value would hide the first.
        """
        for name, value in metrics.items():
            if name in self._values or name in self._samples:
                raise ValueError(
                    f"metric {name!r} of step {self.step} is {self.metrics[name]} already, refusing to overwrite it "
                    f"with {float(value)}; record it under another name"
                )
            self._values[name] = float(value)

    def average(self, samples: Mapping[str, Sequence[float]]) -> None:
        """Records the mean of numbers, e.g. one for each response; another call with a name adds more to its mean."""
        for name, values in samples.items():
            assert name not in self._values, f"{name} is a single number already"
            self._samples.setdefault(name, []).extend(values)

    def count(self, name: str, number: int) -> None:
        """Adds to a count; a name counted several times has the sum."""
        assert name not in self._samples, f"{name} is a mean already"
        self._values[name] = self._values.get(name, 0) + number

    @property
    def timings(self) -> dict[str, float]:
        """Wall seconds of every phase left so far, by phase name."""
        return dict(self._timings)

    @property
    def metrics(self) -> dict[str, float]:
        """Everything recorded so far, the timings as `timing_s/<phase>`."""
        means = {name: fmean(values) for name, values in self._samples.items()}
        return self._values | means | {f"timing_s/{phase}": seconds for phase, seconds in self._timings.items()}

    def _announce_phase(self) -> None:
        if self._on_phase is not None and self._phases:
            self._on_phase(self._phases[-1])
