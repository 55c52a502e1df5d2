# SPDX-License-Identifier: Apache-2.0
"""The logger that writes `report.html`, switched on by `trainer.report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from verl.report.curves import History
from verl.report.run_page import SampleSet, run_page
from verl.report.token_map import TokenMap
from verl.trainer.config import AlgorithmConfig
from verl.trainer.sinks import FileSink, Run, Sink, WrittenFile, read_log, weight_bounds
from verl.trainer.token_weigher import describe_token_weights
from verl.utils.writing import write_text

SETS = {"val": "Held-out responses, step {step}", "train": "Training responses, step {step}"}
"""Heading of each split's samples, in page order."""


class ReportSink(Sink):
    """`report.html` in the run's folder: written anew after every validation and at the end. A run that only validates
    writes `validation_report.html`.

    Curves cover the whole run. After a resume, the earlier part comes from the log of `FileSink`; without that log it
    is missing. The samples shown are the latest of each split.
    """

    PAGE = "report.html"
    PAGE_OF_VALIDATION = "validation_report.html"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._page = run.output_dir / (self.PAGE_OF_VALIDATION if run.only_validates else self.PAGE)
        self._steps: dict[int, dict[str, float | None]] = {}
        if run.continues and (run.output_dir / FileSink.LOG).exists():
            log = read_log(run.output_dir)
            self._steps = {step: metrics for step, metrics in log.items() if step <= run.resume_step}
        self._lacks_beginning = run.resume_step > 0 and not self._steps
        self._samples: dict[str, tuple[int, Sequence[TokenMap]]] = {}
        self._is_written = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._steps.setdefault(step, {}).update(metrics)
        self._is_written = False
        if any(name.startswith("val/") for name in metrics):
            self._write()

    def log_token_maps(self, samples: Sequence[TokenMap], step: int, split: str) -> None:
        self._samples[split] = (step, samples)

    def files(self) -> list[WrittenFile]:
        if not self._is_written:
            self._write()
        return [WrittenFile("report", self._page)]

    def _write(self) -> None:
        sets = [
            SampleSet(heading.format(step=self._samples[split][0]), self._samples[split][1])
            for split, heading in SETS.items()
            if split in self._samples
        ]
        title = f"{self.run.project_name}/{self.run.experiment_name}"
        page = run_page(title, self._notes(), History(self._steps), sets, weight_bounds(self.run))
        write_text(self._page, page)
        self._is_written = True

    def _notes(self) -> list[str]:
        """Sentences on what is trained, the current step, and the token weights."""
        config = self.run.config
        algorithm, actor = AlgorithmConfig(**config["algorithm"]), config["worker"]["actor"]
        is_measured = config["worker"]["rollout"]["collect_attentions"]
        notes = [
            f"Trained with {algorithm.adv_estimator} from {actor['model']['model_path']}: "
            f"step {max(self._steps, default=self.run.resume_step)} of {self.run.total_steps}.",
            f"{describe_token_weights(algorithm, is_measured).capitalize()}.",
        ]
        if self._lacks_beginning:
            notes.append(f"Resumed from step {self.run.resume_step}: this folder has no log of the steps before.")
        if not is_measured:
            notes.append("Attention is not measured: worker.rollout.collect_attentions=true does.")
        return notes
