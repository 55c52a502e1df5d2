# SPDX-License-Identifier: Apache-2.0
"""Trains arms that differ in a few overrides, over warm starts and seeds, and tests which differences are significant.

    python scripts/compare_signals.py examples/study/digits.yaml --processes 2
    python scripts/compare_signals.py examples/study/digits.yaml --table-only

A study is a YAML file:

    config: examples/quickstart.yaml  # of every run
    prepare: "{python} scripts/make_digits.py --output {data} --seed {warm_start}"  # optional
    overrides:                        # of every run
      - data.train_files={data}/train.parquet
      - data.seed={seed}
    accuracy: accuracy                # the key of the reward function that is compared
    warm_starts: [1, 2, 3]            # names or numbers; [0] by default
    seeds: [1, 2, 3, 4, 5]
    arms:                             # the first is what the others are compared with
      uniform: [algorithm.enable_token_weights=false]
      vgr: []

The command of `prepare` makes the data of each warm start once, in the folder `{data}`. `{warm_start}` and `{seed}`
are replaced by the run's warm start and seed. Each run has a process and a Ray cluster of its own, and leaves a JSON
line in the study's file with the ending `.jsonl`. Runs whose line is there are not run again; an interrupted run
starts anew. The table is printed, the picture is the `.svg` beside. A selection's picture has the selection in its
name.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from signal_study import Run, Study, StudyError
from signal_table import Line, add_line, draw, read_lines, remarks, table

from verl.trainer.config import PPOConfig, load_config
from verl.trainer.sinks import read_log, read_val_rewards
from verl.utils.lasting_output import survive_lost_readers
from verl.utils.run_lock import locked_folder, require_free_folder

ROOT = Path(__file__).resolve().parent.parent

CURVES = ("reward/{accuracy}", "actor/grad_norm")
"""Kept step by step."""
AREAS_OF_MEANS = ("token_weights", "signals", "vgr")
MEANS = ("actor/grad_norm", "actor/entropy_loss", "response_length/mean")
"""Metrics, and areas of metrics, that are kept as means over the steps."""

# ---- running ----


class RunFailed(StudyError):
    """The error of a run after which the others go on."""


class Runner:
    """Trains the runs that have no line yet.

    Args:
        study: the study.
        folder: folder of data and runs.
        lines: file of the lines.
        keep: whether to keep the runs' checkpoints.
        threads: threads per process.
    """

    def __init__(self, study: Study, folder: Path, lines: Path, keep: bool = False, threads: int = 1) -> None:
        self.study = study
        self.folder = folder.absolute()
        self.lines = lines
        self.keep = keep
        self.threads = threads
        self._stops = threading.Event()
        self._live: set[subprocess.Popen] = set()

    def run(self, runs: Sequence[Run], processes: int) -> list[str]:
        """Train the runs without a line, several at a time.

        Returns:
            An error text for each run that failed.
        """
        done = {line.key for line in read_lines(self.lines)}
        left = [run for run in runs if run.key not in done]
        print(f"{len(runs) - len(left)} of {len(runs)} runs are done, {len(left)} left", flush=True)
        for warm_start in dict.fromkeys(run.warm_start for run in left):
            self._prepare(warm_start)
        for run in {run.arm: run for run in left}.values():
            self.config_of(run)
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        failures: list[str] = []
        with ThreadPoolExecutor(processes) as pool:
            futures = {pool.submit(self._train, run): run for run in left}
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    run = futures[future]
                    try:
                        line = future.result()
                    except RunFailed as error:
                        failures.append(f"{run.name}: {error}")
                        print(f"[{number}/{len(left)}] {failures[-1]}", flush=True)
                        continue
                    add_line(self.lines, line)
                    before = "" if line.before is None else f"{line.before:.3f} -> "
                    print(
                        f"[{number}/{len(left)}] {run.name}: {before}{line.accuracy:.3f}, {line.seconds:.0f} s",
                        flush=True,
                    )
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return failures

    def _data(self, warm_start: int | str) -> Path:
        return self.folder / "data" / str(warm_start)

    def _prepare(self, warm_start: int | str) -> None:
        """Make the data of a warm start, unless the same command has made them."""
        if self.study.prepare is None:
            return
        data = self._data(warm_start)
        command = shlex.split(self.study.preparation(warm_start, data))
        stamp = Path(f"{data}.command")
        if stamp.exists() and stamp.read_text("utf-8") == shlex.join(command):
            return
        print(f"preparing warm start {warm_start}", flush=True)
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True)
        log = Path(f"{data}.txt")
        if self._call(command, log) != 0:
            raise StudyError(f"prepare failed for warm start {warm_start}; its output ends\n{_tail(log)}")
        stamp.write_text(shlex.join(command), "utf-8")

    def _arguments(self, run: Run) -> list[str]:
        return [
            f"config={self.study.config}",
            *run.overrides(self._data(run.warm_start)),
            "trainer.logger=[file]",
            "trainer.report=false",
            f"trainer.experiment_name={run.name}",
            f"trainer.save_checkpoint_path={self._folder_of(run)}",
            "trainer.find_last_checkpoint=false",
        ]

    def _folder_of(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def config_of(self, run: Run) -> PPOConfig:
        """The configuration that a run will have.

        Raises:
            StudyError: naming the arm and the key.
        """
        try:
            return load_config(self._arguments(run))
        except (ValueError, OSError) as error:
            raise StudyError(f"arms.{run.arm}: {error}") from None

    def _train(self, run: Run) -> Line:
        """One run, from an empty folder to its line.

        Raises:
            RunFailed: the training failed.
            StudyError: the line could not be made, which would be so for every run.
        """
        if self._stops.is_set():
            raise RunFailed("not started")
        folder = self._folder_of(run)
        require_free_folder(str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = self.config_of(run)
        model, questions = identity(config.worker.actor.model.model_path), identity(config.data.val_files)
        started, log = time.monotonic(), Path(f"{folder}.txt")
        code = self._call([sys.executable, "-m", "verl.trainer.main", *self._arguments(run)], log)
        if code != 0 or self._stops.is_set():
            raise RunFailed(f"ended with code {code}; its output ends\n{_tail(log)}")
        line = line_of(run, folder, model, questions, time.monotonic() - started)
        if not self.keep:
            for checkpoint in folder.glob("global_step_*"):
                shutil.rmtree(checkpoint)
        return line

    def _call(self, command: Sequence[str], log: Path) -> int:
        """Run a command with temporary files of its own; its exit code."""
        with tempfile.TemporaryDirectory(prefix="run_") as temporary, open(log, "w", encoding="utf-8") as output:
            environment = {
                **os.environ,
                **dict.fromkeys(("TMPDIR", "RAY_TMPDIR"), temporary),
                **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads)),
            }
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            self._live.add(process)
            try:
                return process.wait()
            except BaseException:
                process.terminate()
                raise
            finally:
                self._live.discard(process)

    def _stop(self) -> None:
        self._stops.set()
        for process in list(self._live):
            process.send_signal(signal.SIGTERM)


def identity(source: str) -> str:
    """Identity of a model or dataset: the SHA-256 of its weights or its file, or a hub id itself."""
    path = Path(source)
    files = sorted(file for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))
    if path.is_file():
        files = [path]
    if not files:
        return source
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest() if len(files) > 1 else opened.read())
    return digest.hexdigest()


def line_of(run: Run, folder: Path, model: str, questions: str, seconds: float) -> Line:
    """The line of a finished run.

    Raises:
        StudyError: its held-out results lack the key that is compared.
    """
    log, key = read_log(folder), run.study.accuracy
    val_rewards = read_val_rewards(folder)
    last = max(log)
    if last not in val_rewards or key not in val_rewards[last]:
        raise StudyError(f"accuracy={key} is not among the held-out results, {', '.join(val_rewards.get(last, {}))}")
    validation = {step: fmean(rewards[key]) for step, rewards in val_rewards.items()}
    steps = [metrics for metrics in log.values() if "actor/grad_norm" in metrics]
    curves = {name: _values(steps, name) for name in (curve.format(accuracy=key) for curve in CURVES)}
    names = [name for name in steps[0] if name.partition("/")[0] in AREAS_OF_MEANS]
    means = {name: _values(steps, name) for name in (*MEANS, *names)}
    return Line(
        task=run.study.name,
        arm=run.arm,
        warm_start=run.warm_start,
        seed=run.seed,
        model=model,
        questions=questions,
        overrides=run.study.arms[run.arm],
        results=np.array(val_rewards[last][key], dtype=float),
        validation={step: _rounded(value) for step, value in validation.items()},
        curves={name: [_rounded(value, 3) for value in values] for name, values in curves.items()},
        means={name: _rounded(fmean(values)) for name, values in means.items() if values},
        seconds=round(seconds),
    )


def _values(steps: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    """The finite values of a metric, by step."""
    return [step[name] for step in steps if step.get(name) is not None]


def _rounded(value: float, digits: int = 4) -> float:
    """Rounds to significant digits."""
    return float(f"{value:.{digits}g}")


def _tail(log: Path, num_lines: int = 15) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-num_lines:])


# ---- the command ----


def main(arguments: argparse.Namespace) -> int:
    """Train the remaining runs, print the table and draw the picture; return 1 if a run failed."""
    study = Study.read(arguments.study)
    if arguments.first is not None:
        study.runs(arms=[arguments.first])  # refuses what is no arm
    lines = arguments.lines or arguments.study.with_suffix(".jsonl")
    runs = study.runs(arguments.arms, arguments.warm_starts, arguments.seeds)
    selected = {run.key for run in runs}
    require_same_arms(study, [line for line in read_lines(lines) if line.key in selected], lines)
    failures: list[str] = []
    if not arguments.table_only:
        folder = arguments.folder or Path("checkpoints") / "study" / study.name
        with locked_folder(str(folder)):
            failures = Runner(study, folder, lines, arguments.keep, arguments.threads).run(runs, arguments.processes)
    shown = [line for line in read_lines(lines) if line.key in selected]
    if arguments.table_only and not shown:
        raise StudyError(f"{lines} has no lines of these runs; without --table-only this command trains them")
    if shown:
        arms = sorted(study.arms, key=lambda arm: arm != arguments.first)
        curve = f"reward/{study.accuracy}"
        print(table(shown, arms, curve))
        print("".join(f"\n{remark}" for remark in remarks(shown, arms)))
        picture = lines.with_name(f"{lines.stem}{selection_of(arguments)}.svg")
        draw(shown, arms, picture, curve)
        print(f"picture  {picture}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return int(bool(failures))


def require_same_arms(study: Study, lines: Sequence[Line], path: Path) -> None:
    """Raise if a line's arm had other overrides than it has in the study now."""
    for line in lines:
        if line.overrides != study.arms[line.arm]:
            raise StudyError(
                f"{path}: arm {line.arm}, warm start {line.warm_start}, seed {line.seed} was trained with "
                f"{line.overrides}, and arms.{line.arm} is {study.arms[line.arm]} now; name a changed arm anew, or "
                "start other lines with --lines"
            )


def selection_of(arguments: argparse.Namespace) -> str:
    """The ending of a selection's picture, such as `_arms_uniform_vgr`, empty for the whole study.

    A selection leaves the picture of the whole study as it is.
    """
    options = {"first": arguments.first and [arguments.first]}
    options |= {name: getattr(arguments, name) for name in ("arms", "warm_starts", "seeds")}
    return "".join(f"_{name}_{'_'.join(values)}" for name, values in options.items() if values)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="its YAML file")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process of a run (%(default)s)")
    parser.add_argument("--folder", type=Path, help="of data and runs (checkpoints/study/NAME)")
    parser.add_argument("--lines", type=Path, help="the file of the lines (STUDY.jsonl)")
    parser.add_argument("--table-only", action="store_true", help="only read the lines")
    parser.add_argument("--first", help="the arm that others are compared with (the study's first)")
    parser.add_argument("--keep", action="store_true", help="keep the runs' checkpoints")
    for name in ("arms", "warm-starts", "seeds"):
        parser.add_argument(f"--{name}", nargs="+", help="only these are run and shown")
    return parser.parse_args(words)


if __name__ == "__main__":
    survive_lost_readers()  # such as `| head`
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(parse()))
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
