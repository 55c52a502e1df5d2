# SPDX-License-Identifier: Apache-2.0
"""Where metrics, sampled generations and progress go: a `Tracker` in front of the sinks named in `trainer.logger`."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


class Generation(NamedTuple):
    """One sample shown to the reader: the prompt, what the model wrote, the ground truth, the reward."""

    input: str
    output: str
    label: str
    score: float


@dataclass(frozen=True)
class Run:
    """What a sink may want to know about the run it reports on."""

    config: dict[str, Any]
    """The whole configuration as plain dicts and lists."""
    project_name: str
    experiment_name: str
    output_dir: Path
    """Folder of the run's own files; it exists."""
    total_steps: int
    resume_step: int
    """The step that a resumed run continues after; 0 for a fresh one."""


class Sink:
    """One destination. A subclass overrides what it can show and ignores the rest."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of one step; may be called more than once for a step."""

    def log_generations(self, samples: Sequence[Generation], step: int) -> None:
        """Takes a few samples of a validation."""

    def phase(self, name: str) -> None:
        """Hears which phase of the step begins."""

    def note(self, text: str) -> None:
        """Takes a line for the person who watches the run."""

    def close(self) -> None:
        """Writes out what is buffered."""


class ConsoleSink(Sink):
    """A progress bar over the steps on a terminal, log messages above it; elsewhere one compact line a step."""

    SHOWN = {
        "reward/overall": ("reward", ".3f"),
        "val/reward_score": ("held-out", ".3f"),
        "response_length/mean": ("length", ".1f"),
        "perf/time_per_step": ("s/step", ".1f"),
    }
    """Metrics worth the line: name -> (label, format)."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._latest: dict[str, float] = {}
        self._at_close = ExitStack()
        self._bar = self._at_close.enter_context(
            tqdm(
                total=run.total_steps,
                initial=run.resume_step,
                desc="starting",
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr,
                disable=not sys.stderr.isatty(),
            )
        )
        if not self._bar.disable:
            self._at_close.enter_context(logging_redirect_tqdm())

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._latest.update((name, value) for name, value in metrics.items() if name in self.SHOWN)
        held_out = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
        if held_out:
            scores = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
            self.note(f"validation at step {step}: {scores}")

        shown = [
            (label, form, self._latest[name]) for name, (label, form) in self.SHOWN.items() if name in self._latest
        ]
        figures = ", ".join(f"{label} {value:{form}}" for label, form, value in shown)
        if not self._bar.disable:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        elif "reward/overall" in metrics:
            self.note(f"step {step}/{self.run.total_steps}: {figures}")

    def log_generations(self, samples: Sequence[Generation], step: int) -> None:
        for number, sample in enumerate(samples, start=1):
            self.note(
                f"--- step {step}, sample {number} of {len(samples)}, score {sample.score:.3f}\n"
                f"[prompt] {sample.input}\n[output] {sample.output}\n[ground_truth] {sample.label}"
            )

    def phase(self, name: str) -> None:
        self._bar.set_description(name)

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._at_close.close()


class FileSink(Sink):
    """Three files beside the checkpoints: the configuration, a JSON line per `log`, the sampled generations.

    A resumed run appends to the last two. Steps that the interrupted run took after its last checkpoint then appear
    twice in `experiment_log.jsonl`; the later line is the one that the weights have seen.
    """

    CONFIG = "experiment_config.json"
    LOG = "experiment_log.jsonl"
    GENERATIONS = "generations.log"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        (run.output_dir / self.CONFIG).write_text(json.dumps(run.config, indent=2, ensure_ascii=False), "utf-8")
        if run.resume_step == 0:
            for name in (self.LOG, self.GENERATIONS):
                (run.output_dir / name).write_text("", "utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # JSON has no word for NaN and infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(self.LOG, json.dumps({"step": step, **nested(finite)}) + "\n")

    def log_generations(self, samples: Sequence[Generation], step: int) -> None:
        for sample in samples:
            self._append(
                self.GENERATIONS,
                f"[prompt] {sample.input}\n[output] {sample.output}\n"
                f"[ground_truth] {sample.label}\n[score] {sample.score}\n\n",
            )

    def _append(self, name: str, text: str) -> None:
        with open(self.run.output_dir / name, "a", encoding="utf-8") as file:
            file.write(text)


class TensorboardSink(Sink):
    """Event files in `$TENSORBOARD_DIR/<project>/<experiment>`, with the configuration as hyper-parameters."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where it is asked for

        super().__init__(run)
        folder = Path(os.environ.get("TENSORBOARD_DIR", "tensorboard_log")) / run.project_name / run.experiment_name
        # Points past the checkpoint belong to steps that are taken again: viewers drop them at the purge mark.
        self._writer = SummaryWriter(str(folder), purge_step=run.resume_step + 1 if run.resume_step else None)
        self._writer.add_hparams(hyper_parameters(run.config), metric_dict={}, run_name=".")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


SINKS: dict[str, type[Sink]] = {"console": ConsoleSink, "file": FileSink, "tensorboard": TensorboardSink}


class Tracker:
    """Hands every report of the run to all the sinks asked for. Usable as a context manager.

    Args:
        loggers: names out of `SINKS`.
        config: the whole configuration as plain dicts and lists.
        project_name, experiment_name: how the run is labelled.
        output_dir: folder of the run's own files, made if missing.
        total_steps: the step at which training ends.
        resume_step: the step of the checkpoint that the run continues from; 0 starts the log files anew.

    Raises:
        ValueError: a logger that does not exist.
    """

    def __init__(
        self,
        loggers: Sequence[str],
        config: dict[str, Any],
        project_name: str,
        experiment_name: str,
        output_dir: str | Path,
        total_steps: int,
        resume_step: int = 0,
    ) -> None:
        unknown = [name for name in loggers if name not in SINKS]
        if unknown:
            raise ValueError(f"trainer.logger names {unknown}, which this version lacks; choose from {sorted(SINKS)}")
        run = Run(config, project_name, experiment_name, Path(output_dir), total_steps, resume_step)
        run.output_dir.mkdir(parents=True, exist_ok=True)
        self._sinks = [SINKS[name](run) for name in loggers]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Reports metrics named `area/name`: Python numbers, numpy scalars or one-element tensors."""
        values = {name: float(value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.log(values, step)

    def log_generations(self, samples: Sequence[tuple[str, str, str, float]], step: int) -> None:
        """Reports samples as (input, output, label, score)."""
        generations = [Generation(*sample) for sample in samples]
        for sink in self._sinks:
            sink.log_generations(generations, step)

    def phase(self, name: str) -> None:
        """Says which phase of the step begins."""
        for sink in self._sinks:
            sink.phase(name)

    def note(self, text: str) -> None:
        """Says a line to the person who watches the run."""
        for sink in self._sinks:
            sink.note(text)

    def close(self) -> None:
        """Writes out and releases every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def nested(metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """`{"a/b": 1, "a/c": 2}` as `{"a": {"b": 1, "c": 2}}`.

    Raises:
        ValueError: a name is both a metric and an area, as "a" and "a/b" are.
    """
    tree: dict[str, Any] = {}
    for name, value in metrics.items():
        *areas, leaf = name.split("/")
        branch = tree
        for area in areas:
            branch = branch.setdefault(area, {})
            if not isinstance(branch, dict):
                raise ValueError(f"metric {name!r} lies below another metric's name; rename one of the two")
        if leaf in branch:
            raise ValueError(f"metric {name!r} is also the area of other metrics; rename one of the two")
        branch[leaf] = value
    return tree


def hyper_parameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """The configuration with dotted keys and values of the kinds that tensorboard takes; others become text."""
    flat: dict[str, bool | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= hyper_parameters(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return flat
