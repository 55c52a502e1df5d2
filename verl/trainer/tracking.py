# SPDX-License-Identifier: Apache-2.0
"""The `Tracker`, which passes metrics, sampled generations and progress to the loggers of `trainer.logger`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.trainer.console import ConsoleSink
from verl.trainer.library_sinks import MlflowSink, SwanlabSink, TensorboardSink, WandbSink
from verl.trainer.sinks import FileSink, Generation, Run, Sink, WrittenFile
from verl.utils.checkpoint import ResumePoint
from verl.utils.masking import masked
from verl.utils.writing import write_json

if TYPE_CHECKING:
    from verl.report.token_map import TokenMap

logger = logging.getLogger(__name__)

SINKS: dict[str, type[Sink]] = {
    "console": ConsoleSink,
    "file": FileSink,
    "mlflow": MlflowSink,
    "swanlab": SwanlabSink,
    "tensorboard": TensorboardSink,
    "wandb": WandbSink,
}
"""Every logger by its name. Add a new one here and to the choices of `TrainerConfig.logger`."""

RUN_IDS = "run_ids.json"
"""File in the run's folder with the ids that servers gave to the run."""


def require_loggers(loggers: Iterable[str]) -> None:
    """Raise unless every logger exists, its library is installed and it has an account where it needs one.

    Raises:
        ValueError: one line for each problem.
    """
    problems = []
    for name in loggers:
        if name not in SINKS:
            problems.append(f"trainer.logger={name} does not exist; choose from {', '.join(SINKS)}")
        elif (library := SINKS[name].LIBRARY) is not None and not _is_installed(library):
            install = f"pip install -e '.[{name}]' in the repository's root installs it"
            problems.append(f"trainer.logger={name} needs the package {library}, which is not installed; {install}")
        elif (problem := SINKS[name].account_problem()) is not None:
            problems.append(f"trainer.logger={name} {problem}; trainer.logger=[console,file] has no server")
    if problems:
        raise ValueError("\n".join(problems))


def _is_installed(library: str) -> bool:
    # A folder of that name in the working folder, as wandb leaves one, is found too, but has no file to import.
    spec = find_spec(library)
    return spec is not None and spec.origin is not None


class Tracker:
    """Passes every report of the run to all of its loggers. A context manager.

    A logger that cannot start ends the run. One that fails later does too, unless it has a server behind it: then
    the failure is logged with its traceback and training goes on without that report.

    Args:
        loggers: names from `SINKS`.
        config: the whole configuration as plain dicts and lists. Loggers see it without its secrets (`masked`).
        project_name, experiment_name: names under which loggers file the run.
        output_dir: folder of the run's files, created if missing. A run that resumes from a checkpoint in it keeps its
            log files and its ids at the servers; any other run starts new ones.
        total_steps: the step at which training ends.
        resume_point: the checkpoint that the run starts from; None for the model's own weights.
        report: whether to write `report.html`, in addition to the loggers.
        only_validates: whether the run trains nothing. It starts runs of its own at the servers, and leaves the
            configuration, the ids and the report in the folder alone.

    Raises:
        ValueError: a logger that does not exist or whose library is not installed.
    """

    def __init__(
        self,
        loggers: Sequence[str],
        config: dict[str, Any],
        project_name: str,
        experiment_name: str,
        output_dir: str | Path,
        total_steps: int,
        resume_point: ResumePoint | None = None,
        report: bool = False,
        only_validates: bool = False,
    ) -> None:
        require_loggers(loggers)
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        ids_file = output_dir / RUN_IDS
        continues = resume_point is not None and resume_point.is_under(str(output_dir))
        keeps_ids = continues and not only_validates and ids_file.exists()
        kept_ids = json.loads(ids_file.read_text("utf-8")) if keeps_ids else {}
        resume_step = resume_point.step if resume_point is not None else 0
        run = Run(
            masked(config),
            project_name,
            experiment_name,
            output_dir,
            total_steps,
            resume_step,
            continues,
            only_validates,
            kept_ids,
        )

        self._sinks: dict[str, Sink] = {}
        self._file_sources: list[Callable[[], Iterable[WrittenFile]]] = [
            lambda: [WrittenFile("ids of loggers' runs", ids_file)]
        ]
        for name in dict.fromkeys(loggers):
            try:
                self._sinks[name] = SINKS[name](run)
            except BaseException as error:
                error.add_note(f"The logger that could not start is trainer.logger={name}.")
                if name in kept_ids:
                    error.add_note(f"It was to take up run {kept_ids[name]}; without {ids_file} it starts a new one.")
                self.close(failed=True)
                raise
        if report:
            from verl.trainer.report_sink import ReportSink  # slow to import; --help must not wait for it

            self._sinks["report"] = ReportSink(run)
        ids = kept_ids | {name: sink.run_id for name, sink in self._sinks.items() if sink.run_id is not None}
        if only_validates:
            return
        if ids:
            write_json(ids_file, ids)
        else:
            ids_file.unlink(missing_ok=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Reports metrics named `area/name`: Python numbers, numpy scalars or one-element tensors."""
        values = {name: float(value) for name, value in metrics.items()}
        self._report(lambda sink: sink.log(values, step))

    def log_generations(self, samples: Sequence[tuple[str, str, str, float]], step: int, split: str = "val") -> None:
        """Reports samples of a split, `train` or `val`, as (input, output, label, score)."""
        generations = [Generation(*sample) for sample in samples]
        self._report(lambda sink: sink.log_generations(generations, step, split))

    def log_token_maps(self, samples: Sequence[TokenMap], step: int, split: str) -> None:
        """Reports the same samples token by token."""
        self._report(lambda sink: sink.log_token_maps(samples, step, split))

    def log_val_rewards(self, rewards: Mapping[str, Sequence[float]], step: int) -> None:
        """Reports every held-out sample's value of each key of the reward function, in the set's order."""
        self._report(lambda sink: sink.log_val_rewards(rewards, step))

    def phase(self, name: str, line: str | None = None) -> None:
        """Reports that a phase begins; `line` describes it, for phases that log nothing else for a long time."""
        self._report(lambda sink: sink.phase(name, line))

    def validated(self, num_done: int, num_prompts: int) -> None:
        """Reports how many of the held-out prompts have been answered and scored."""
        self._report(lambda sink: sink.validated(num_done, num_prompts))

    def note(self, text: str) -> None:
        """Shows a line to the person who watches the run."""
        self._report(lambda sink: sink.note(text))

    def add_files(self, source: Callable[[], Iterable[WrittenFile]]) -> None:
        """Registers `source`, which lists further written files when it is called at the end of the run."""
        self._file_sources.append(source)

    def close(self, failed: bool = False) -> None:
        """Writes out and releases every logger; `failed` is whether an exception ends the run."""
        try:
            files = [file for source in self._file_sources for file in source()]
            self._report(lambda sink: files.extend(sink.files()))
            there = [file for file in files if file.path.exists()]
            self._report(lambda sink: sink.written(there))
        finally:
            self._report(lambda sink: sink.close(failed))

    def _report(self, report: Callable[[Sink], None]) -> None:
        for name, sink in self._sinks.items():
            try:
                report(sink)
            except Exception:
                if not sink.HAS_SERVER:
                    raise
                logger.exception("trainer.logger=%s failed; training goes on without this report", name)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.close(failed=kind is not None)
