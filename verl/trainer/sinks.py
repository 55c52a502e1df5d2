# SPDX-License-Identifier: Apache-2.0
"""The base class of loggers, `Sink`, with the `Run` that it reports on, and the file logger."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from verl.utils.writing import naming_write_errors, write_json

if TYPE_CHECKING:
    from verl.report.token_map import TokenMap


class Generation(NamedTuple):
    """One sample shown to the reader: the prompt, what the model wrote, the ground truth, the reward."""

    input: str
    output: str
    label: str
    score: float

    def tagged(self) -> str:
        """The three texts, each after its tag."""
        return f"[prompt] {self.input}\n[output] {self.output}\n[ground_truth] {self.label}"


class WrittenFile(NamedTuple):
    """A file or a folder that a run leaves behind."""

    content: str
    """Its content, in a word or two."""
    path: Path


@dataclass(frozen=True)
class Run:
    """What a sink knows about the run it reports on."""

    config: dict[str, Any]
    """The whole configuration as plain dicts and lists, without its secrets."""
    project_name: str
    experiment_name: str
    output_dir: Path
    """Folder of the run's own files; it exists."""
    total_steps: int
    resume_step: int
    """The step of the checkpoint that the run starts from; 0 for the model's own weights."""
    continues: bool
    """Whether that checkpoint is in `output_dir`, so that this run continues the run that saved it."""
    only_validates: bool
    """Whether it trains nothing. It may then read the folder of a run that is training, and leaves its files alone."""
    kept_ids: dict[str, str]
    """Ids that servers gave to the run before its interruption, by logger; empty unless it `continues`."""


def weight_bounds(run: Run) -> tuple[float, float]:
    """Lowest and highest weight of the colour scale of token maps."""
    low, high = run.config["algorithm"]["token_weight_clip"]
    return low, high


class Sink:
    """One destination. A subclass overrides what it can show and ignores the rest."""

    LIBRARY: ClassVar[str | None] = None
    """The module that its constructor imports; None if it needs no further library."""
    HAS_SERVER: ClassVar[bool] = False
    """Whether it depends on a server. If that fails later, the run goes on without it."""

    run_id: str | None = None
    """The id under which a resumed run continues at the server; set by a subclass whose server gives ids."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @classmethod
    def account_problem(cls) -> str | None:
        """Why it cannot log in at its server, as far as this machine can tell, and what to do; None if it can."""
        return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of one step; may be called more than once for a step."""

    def log_generations(self, samples: Sequence[Generation], step: int, split: str) -> None:
        """Takes a few samples of the step's training batch (`train`) or of the validation after it (`val`)."""

    def log_token_maps(self, samples: Sequence[TokenMap], step: int, split: str) -> None:
        """Takes the same samples token by token, in runs that make a report."""

    def log_val_rewards(self, rewards: Mapping[str, Sequence[float]], step: int) -> None:
        """Takes the rewards of all held-out samples of a validation, by key, in the set's order."""

    def phase(self, name: str, line: str | None) -> None:
        """Reports that a phase begins; `line` describes it where a name alone cannot be shown."""

    def validated(self, num_done: int, num_prompts: int) -> None:
        """Reports how many of the held-out prompts have been answered and scored, from 0 to all."""

    def note(self, text: str) -> None:
        """Takes a line for the person who watches the run."""

    def files(self) -> Sequence[WrittenFile]:
        """The files that it writes on this machine; files that do not exist yet are ignored."""
        return ()

    def written(self, files: Sequence[WrittenFile]) -> None:
        """Reports, just before `close`, the files and folders that the run leaves behind."""

    def close(self, failed: bool) -> None:
        """Writes out what is buffered; `failed` is whether an exception ends the run."""


class FileSink(Sink):
    """Files beside the checkpoints: the configuration, a JSON line per `log`, the sampled generations of each split,
    and the rewards of all held-out samples.

    Only its owner can read the configuration file (mode 0600): arguments of a reward function may be secrets under any
    name. The rewards file has a line per validation, `{"step": 25, "rewards": {"overall": [0.1, 1.0, ...], ...}}`, the
    samples in the held-out set's order. A step that was validated twice has two lines.

    The other files only grow. When a run takes its first step, lines that an earlier run wrote for this step or later
    ones move from `experiment_log.jsonl` to `experiment_log.cut.jsonl`; an incomplete line moves at the start. A run
    that only validates adds lines, and neither moves any nor replaces the configuration.
    """

    CONFIG = "experiment_config.json"
    LOG = "experiment_log.jsonl"
    CUT = "experiment_log.cut.jsonl"
    GENERATIONS = {"val": "generations.log", "train": "train_generations.log"}
    VAL_REWARDS = "val_rewards.jsonl"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        if not (run.only_validates and (run.output_dir / self.CONFIG).exists()):
            write_json(run.output_dir / self.CONFIG, run.config, private=True)
        for name in (self.LOG, self.GENERATIONS["val"], self.VAL_REWARDS):
            self._append(name, "")
        self._num_old_lines: int | None = None
        if not run.only_validates:
            self._num_old_lines = self._cut_log(lambda index, line: True)
        elif not self._ends_a_line():
            self._append(self.LOG, "\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._num_old_lines is not None and step > self.run.resume_step:
            num_old, last = self._num_old_lines, self.run.resume_step if self.run.continues else -1
            self._cut_log(lambda index, line: index >= num_old or line["step"] <= last)
            self._num_old_lines = None
        finite = {name: _finite(value) for name, value in metrics.items()}
        self._append(self.LOG, json.dumps({"step": step, **nested(finite)}) + "\n")

    def _ends_a_line(self) -> bool:
        text = (self.run.output_dir / self.LOG).read_bytes()
        return not text or text.endswith(b"\n")

    def _cut_log(self, is_kept: Callable[[int, dict[str, Any]], bool]) -> int:
        """Moves lines from the log to the cut file: damaged lines, and lines for which `is_kept` returns false.

        Args:
            is_kept: called with a line's number, from 0 on, and its content.

        Returns:
            The number of lines that remain in the log.
        """
        path = self.run.output_dir / self.LOG
        kept, cut = [], []
        with naming_write_errors(path):
            for index, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(keepends=True)):
                record = _whole_record(line)
                (kept if record is not None and is_kept(index, record) else cut).append(line)
            if cut:
                self._append(self.CUT, "".join(line.rstrip("\n") + "\n" for line in cut))
                unfinished = path.with_suffix(".tmp")
                unfinished.write_text("".join(kept), "utf-8")
                unfinished.replace(path)
        return len(kept)

    def log_generations(self, samples: Sequence[Generation], step: int, split: str) -> None:
        for sample in samples:
            self._append(self.GENERATIONS[split], f"{sample.tagged()}\n[score] {sample.score}\n\n")

    def log_val_rewards(self, rewards: Mapping[str, Sequence[float]], step: int) -> None:
        finite = {key: [_finite(value) for value in values] for key, values in rewards.items()}
        self._append(self.VAL_REWARDS, json.dumps({"step": step, "rewards": finite}) + "\n")

    def files(self) -> list[WrittenFile]:
        names = {
            "configuration": self.CONFIG,
            "metrics": self.LOG,
            "metrics of steps taken again": self.CUT,
            "generations": self.GENERATIONS["val"],
            "generations of training": self.GENERATIONS["train"],
            "held-out rewards": self.VAL_REWARDS,
        }
        return [WrittenFile(content, self.run.output_dir / name) for content, name in names.items()]

    def _append(self, name: str, text: str) -> None:
        path = self.run.output_dir / name
        with naming_write_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(text)


def _finite(value: float) -> float | None:
    """None in place of NaN and infinity, which JSON cannot express."""
    value = float(value)
    return value if math.isfinite(value) else None


def _whole_record(line: str) -> dict[str, Any] | None:
    """The content of a line of the log; None if it is damaged."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_record and line.endswith("\n") else None


def read_log(folder: Path) -> dict[int, dict[str, float | None]]:
    """The metrics that `FileSink` wrote: step -> metrics by name, None for values that were not finite.

    A step may have several lines, for example one of the validation before training; they are merged.
    """
    metrics: dict[int, dict[str, float | None]] = {}
    for line in (folder / FileSink.LOG).read_text("utf-8").splitlines(keepends=True):
        record = _whole_record(line)
        if record is not None:
            metrics.setdefault(record.pop("step"), {}).update(_flat(record))
    return dict(sorted(metrics.items()))


def read_val_rewards(folder: Path) -> dict[int, dict[str, list[float | None]]]:
    """The validation rewards that `FileSink` wrote: step -> values by key of the reward function, in the set's order.

    For a step that was validated twice, the second validation counts.
    """
    lines = (folder / FileSink.VAL_REWARDS).read_text("utf-8").splitlines(keepends=True)
    return {record["step"]: record["rewards"] for line in lines if (record := _whole_record(line)) is not None}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def nested(metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """`{"a/b": 1, "a/c": 2}` as `{"a": {"b": 1, "c": 2}}`.

    A name that is itself a metric holds no others: `a/b` beside `a/b/c` become `{"a": {"b": 1, "b/c": 2}}`.
    """
    tree: dict[str, Any] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        depths = range(1, len(parts))
        depth = next((depth for depth in depths if "/".join(parts[:depth]) in metrics), len(parts)) - 1
        branch = tree
        for area in parts[:depth]:
            branch = branch.setdefault(area, {})
        branch["/".join(parts[depth:])] = value
    return tree
