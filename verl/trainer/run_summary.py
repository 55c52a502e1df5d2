# SPDX-License-Identifier: Apache-2.0
"""A table at the end of a run: first and last values of its metrics, its duration, the files it wrote."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from verl.trainer.sinks import Run, WrittenFile

REWARD, HELD_OUT_REWARD, HELD_OUT_ACCURACY = "reward/overall", "val/reward_score", "val/accuracy_reward"

ROWS = {
    REWARD: "reward",
    HELD_OUT_REWARD: "held-out reward",
    HELD_OUT_ACCURACY: "held-out accuracy",
    "vgr/median": "VGR",
}
"""The metrics that the table shows: label by metric name."""

HELD_OUT = (HELD_OUT_REWARD, HELD_OUT_ACCURACY)
"""Metrics with a best step: they come from the same prompts at every step."""


class Value(NamedTuple):
    """A metric at a step."""

    step: int
    number: float

    def __str__(self) -> str:
        return f"{self.number:.3f} (step {self.step})"


class RunSummary:
    """Collects the metrics of a run and writes the table.

    Time and metrics cover this process only: the part of a run before its resume is not included.

    Args:
        run: gives its name and its number of steps.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step = run.resume_step
        self.num_tokens = 0
        self._start = time.monotonic()
        self._values: dict[str, list[Value]] = {name: [] for name in ROWS}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of a step."""
        self.step = step
        self.num_tokens += int(metrics.get("perf/total_num_tokens", 0))
        for name in self._values.keys() & metrics.keys():
            self._values[name].append(Value(step, metrics[name]))

    def text(self, files: Sequence[WrittenFile], failed: bool) -> str:
        """The table.

        Args:
            files: the files that the run wrote.
            failed: whether an exception ends it.
        """
        seconds = time.monotonic() - self._start
        steps = f"step {self.step} of {self.run.total_steps}"
        if self.run.resume_step:
            steps += f", resumed at {self.run.resume_step}"
        lines = [
            f"{self.run.project_name}/{self.run.experiment_name} {'broke off' if failed else 'ended'} at {steps}",
            f"{duration(seconds)}, {self.num_tokens:,} tokens of prompts and responses in training",
        ]
        rows = [["", "start", "end", "best"], *self._rows()]
        if len(rows) > 1:
            lines += ["", *aligned(rows)]
        if files:
            lines += ["", "files", *aligned([[f"  {file.content}", str(file.path)] for file in files])]
        return "\n".join(lines)

    def _rows(self) -> list[list[str]]:
        rows = []
        for name, label in ROWS.items():
            values = self._values[name]
            if values:
                best = str(max(values, key=lambda value: value.number)) if name in HELD_OUT else ""
                rows.append([label, str(values[0]), str(values[-1]), best])
        return rows


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with cells of equal width, column by column; all rows have as many cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """`45 s`, `12 min 5 s`, `3 h 20 min`, `2 d 4 h`: two units at most."""
    whole = round(seconds)
    for unit, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"
