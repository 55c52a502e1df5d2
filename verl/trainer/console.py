# SPDX-License-Identifier: Apache-2.0
"""The console as a logger: a live line of the step, a bar of a validation, and a table when the run ends."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from verl.trainer.run_summary import HELD_OUT_ACCURACY, HELD_OUT_REWARD, REWARD, RunSummary, duration
from verl.trainer.sinks import Generation, Run, Sink, WrittenFile

STEP_TIME, STEP_TOKENS = "perf/time_per_step", "perf/total_num_tokens"
WEIGHT_MEAN, WEIGHT_SPREAD = "token_weights/mean", "token_weights/std"

STEPS_AVERAGED = 10
"""How many of the last steps are averaged to estimate the remaining time."""

BAR = "{desc}, step {n_fmt}/{total_fmt} {bar} {elapsed}{postfix}"
VALIDATION_BAR = "{desc} {n_fmt}/{total_fmt} prompts {bar} {elapsed}"


class ConsoleSink(Sink):
    """On a terminal a progress bar over the steps, log messages above it; elsewhere a compact line a step.

    Where there is no bar to show the phase, what takes long before and between the steps gets a line too.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._figures = Figures(run.total_steps)
        self._summary = RunSummary(run)
        self._files: Sequence[WrittenFile] = ()
        self._at_close = ExitStack()
        self._bar = self._at_close.enter_context(
            tqdm(
                total=run.total_steps,
                initial=run.resume_step,
                desc="starting",
                bar_format=BAR,
                dynamic_ncols=True,
                file=sys.stderr,
                disable=not sys.stderr.isatty(),
            )
        )
        self._validation_bar: tqdm | None = None
        if not self._bar.disable:
            self._at_close.enter_context(logging_redirect_tqdm())

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._summary.log(metrics, step)
        self._figures.take(metrics, step)
        held_out = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
        if held_out:
            scores = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
            self.note(f"validation at step {step}: {scores}")
        if not self._bar.disable:
            self._bar.set_postfix_str(self._figures.text(), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        elif REWARD in metrics:
            self.note(f"step {step}/{self.run.total_steps}: {self._figures.text()}")

    def log_generations(self, samples: Sequence[Generation], step: int, split: str) -> None:
        kind = "held-out" if split == "val" else "training"
        for number, sample in enumerate(samples, start=1):
            head = f"--- step {step}, {kind} sample {number} of {len(samples)}, score {sample.score:.3f}"
            self.note(f"{head}\n{sample.tagged()}")

    def phase(self, name: str, line: str | None) -> None:
        if not self._bar.disable:
            self._bar.set_description_str(name)
        elif line is not None:
            self.note(line)

    def validated(self, num_done: int, num_prompts: int) -> None:
        if self._bar.disable:
            return
        if self._validation_bar is None:
            self._validation_bar = tqdm(
                total=num_prompts,
                desc="validation",
                bar_format=VALIDATION_BAR,
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )
        self._validation_bar.update(num_done - self._validation_bar.n)
        self._validation_bar.refresh()
        if num_done == num_prompts:
            self._end_validation_bar()

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def written(self, files: Sequence[WrittenFile]) -> None:
        self._files = files

    def close(self, failed: bool) -> None:
        self._end_validation_bar()
        self._at_close.close()
        self.note(self._summary.text(self._files, failed))

    def _end_validation_bar(self) -> None:
        if self._validation_bar is not None:
            self._validation_bar.close()
            self._validation_bar = None


class Figures:
    """The latest value of each metric that the line of a step shows, and the time that is left.

    Args:
        total_steps: number of steps of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._step = 0
        self._latest: dict[str, float] = {}
        self._step_times: deque[float] = deque(maxlen=STEPS_AVERAGED)

    def take(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of a step."""
        self._step = step
        self._latest.update(metrics)
        if STEP_TIME in metrics:
            self._step_times.append(metrics[STEP_TIME])

    def text(self) -> str:
        """The latest values, separated by commas.

        Weights are shown as mean and standard deviation over the response tokens. The held-out figure is the accuracy
        where the reward function gives one. Tokens per second count prompts and responses, on all devices together.
        """
        parts = []
        held_out = "held-out accuracy" if HELD_OUT_ACCURACY in self._latest else "held-out reward"
        for name, label in (
            (REWARD, "reward"),
            (HELD_OUT_ACCURACY if HELD_OUT_ACCURACY in self._latest else HELD_OUT_REWARD, held_out),
            ("vgr/median", "VGR"),
        ):
            if name in self._latest:
                parts.append(f"{label} {self._latest[name]:.3f}")
        if WEIGHT_SPREAD in self._latest:
            parts.append(f"weights {self._latest[WEIGHT_MEAN]:.2f} ± {self._latest[WEIGHT_SPREAD]:.2f}")
        if STEP_TOKENS in self._latest and self._step_times:
            parts.append(f"{self._latest[STEP_TOKENS] / self._step_times[-1]:,.0f} tokens/s")
        steps_left = self.total_steps - self._step
        if self._step_times and steps_left > 0:
            parts.append(f"{duration(fmean(self._step_times) * steps_left)} left")
        return ", ".join(parts)
