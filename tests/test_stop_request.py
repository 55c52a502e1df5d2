# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_stop_request.py
"""A run that is asked to end: by SIGTERM or Ctrl-C, once or twice, in time or too late, to its process or to all."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.batches import ROWS, write_dataset
from tests.pool import run_shared
from tests.processes import processes_marked
from tests.test_training_run import ROOT, arguments, is_changed, lines_of, weights_at
from verl.data.loader import ROWS_WORTH_WORKERS
from verl.trainer.config import load_config
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.rollouts import Rollouts
from verl.trainer.stop_request import ECHO_SECONDS, StopRequest


def act_in_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    update_actor = RayDAPOTrainer._update_actor

    def update(trainer: RayDAPOTrainer, batch, record) -> None:
        if record.step == step:
            act()
        update_actor(trainer, batch, record)

    monkeypatch.setattr(RayDAPOTrainer, "_update_actor", update)


def ask(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def quiet(model: str, data: list[str], folder: Path, *overrides: str) -> list[str]:
    return arguments(model, data, folder, "trainer.val_before_train=false", *overrides)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_saves_its_step_and_goes_on_bit_for_bit(
    number: signal.Signals,
    tiny_model_path: str,
    data_files: list[str],
    tmp_path: Path,
    ray_cluster,
    monkeypatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The step's validation is left out, for the sake of the time there is. The handlers from before stand again."""
    before = signal.getsignal(number)
    settings = ["trainer.val_freq=1", "trainer.logger=[console,file]"]
    args = quiet(tiny_model_path, data_files, tmp_path / "parts", *settings)
    with monkeypatch.context() as patch:
        act_in_step(patch, 2, ask(number))
        run_shared(load_config(args))
    assert signal.getsignal(number) is before
    folder = tmp_path / "parts"
    summary = capsys.readouterr().err.partition("easy_r1/demo ")[2]
    assert summary.startswith("ended at step 2 of 3\n")
    assert f"last checkpoint     {folder}/global_step_2\n" in summary
    assert [path.name for path in folder.glob("global_step_*")] == ["global_step_2"]
    lines = lines_of(folder / "experiment_log.jsonl")
    assert [(line["step"], "val" in line) for line in lines] == [(1, True), (2, False)]

    run_shared(load_config(args))
    run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path / "whole", *settings)))
    assert is_changed(weights_at(folder, 2), weights_at(folder, 3))
    assert not is_changed(weights_at(folder, 3), weights_at(tmp_path / "whole", 3))


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_asked_twice_it_ends_at_once(
    number: signal.Signals,
    error: type[BaseException],
    tiny_model_path: str,
    data_files: list[str],
    tmp_path: Path,
    ray_cluster,
    monkeypatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twice() -> None:
        ask(number)()
        time.sleep(ECHO_SECONDS)
        ask(number)()
        pytest.fail("the second request changed nothing")

    act_in_step(monkeypatch, 2, twice)
    with pytest.raises(error) as ended:
        run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path, "trainer.logger=[console,file]")))
    if error is SystemExit:
        assert ended.value.code == 143
    summary = capsys.readouterr().err.partition("easy_r1/demo ")[2]
    assert summary.startswith("broke off at step 1 of 3\n") and f"{tmp_path}/experiment_log.jsonl" in summary
    assert not list(tmp_path.glob("global_step_*"))
    assert len(lines_of(tmp_path / "experiment_log.jsonl")) == 1


def test_asked_twice_while_workers_generate_it_closes_its_loggers_without_waiting_for_them(
    tiny_model_path: str,
    data_files: list[str],
    tmp_path: Path,
    ray_cluster,
    monkeypatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The workers are busy, as with a long generation, until the run has ended, or for 8 seconds."""
    draw, done = Rollouts.draw, tmp_path / "the run has ended"
    asked_at: list[float] = []

    def be_busy(_: object) -> None:
        deadline = time.monotonic() + 8
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    def draw_and_ask(rollouts: Rollouts, record):
        if record.step == 2:
            for actor in rollouts.workers.processes._actors:
                actor.__ray_call__.remote(be_busy)
            ask(signal.SIGTERM)()
            time.sleep(ECHO_SECONDS)
            asked_at.append(time.monotonic())
            ask(signal.SIGTERM)()
        return draw(rollouts, record)

    monkeypatch.setattr(Rollouts, "draw", draw_and_ask)
    with pytest.raises(SystemExit, match="143"):
        run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path / "run", "trainer.logger=[console,file]")))
    seconds = time.monotonic() - asked_at[0]
    done.touch()
    assert seconds < 6
    assert "broke off at step 1 of 3\n" in capsys.readouterr().err


def test_a_fork_that_is_asked_to_end_does_so_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """A process that filters rows has a copy of the driver's handler, and no step to finish."""
    stop_request = StopRequest(300)
    stop_request.let_steps_finish()
    with stop_request.listening():
        fork = os.fork()
        if fork == 0:
            ask(signal.SIGTERM)()
            os._exit(0)
        _, status = os.waitpid(fork, 0)
    assert os.waitstatus_to_exitcode(status) == 143
    assert capfd.readouterr().err == ""
    assert not stop_request


def test_a_step_that_outlasts_the_grace_period_is_given_up(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch
) -> None:
    def outlast() -> None:
        ask(signal.SIGTERM)()
        start = time.monotonic()
        while time.monotonic() < start + 20:
            time.sleep(0.1)

    act_in_step(monkeypatch, 2, outlast)
    args = quiet(tiny_model_path, data_files, tmp_path, "trainer.grace_s=0.5", "trainer.save_freq=1")
    start = time.monotonic()
    with pytest.raises(SystemExit, match="143"):
        run_shared(load_config(args))
    assert time.monotonic() - start < 15
    assert [path.name for path in tmp_path.glob("global_step_*")] == ["global_step_1"]


def test_before_the_first_step_there_is_nothing_to_finish(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch
) -> None:
    monkeypatch.setattr(RayDAPOTrainer, "init_workers", lambda _: ask(signal.SIGTERM)())
    with pytest.raises(SystemExit, match="143"):
        run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path)))


@pytest.mark.ray
def test_a_sigterm_to_every_process_of_the_run_lets_it_save_and_leaves_none(
    tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    """As Slurm sends it. Ray, which has a handler of its own in the driver, the workers, and the processes that read a
    set of this size outlive it."""
    mark = uuid.uuid4().hex
    text_rows = [row for row in ROWS if not row["images"]]
    train = write_dataset(tmp_path / "train.parquet", text_rows, copies=-(-ROWS_WORTH_WORKERS // len(text_rows)))
    args = quiet(tiny_model_path, data_files, tmp_path, f"data.train_files={train}", "trainer.max_steps=1000")
    with subprocess.Popen(
        [sys.executable, "-m", "verl.trainer.main", *args],
        cwd=ROOT,
        env={**os.environ, "VERL_TEST_MARK": mark},
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        wait_for_steps(tmp_path, 1)
        everyone = processes_marked(mark)
        assert "pt_data_worker" in {psutil.Process(pid).name() for pid in everyone}
        for pid in everyone:
            os.kill(pid, signal.SIGTERM)
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 0, errors
    assert "SIGTERM: finishing the step and saving, for up to trainer.grace_s=300 s" in errors
    assert processes_marked(mark) == []
    (saved,) = tmp_path.glob("global_step_*")
    assert saved.name == f"global_step_{lines_of(tmp_path / 'experiment_log.jsonl')[-1]['step']}"


def wait_for_steps(folder: Path, count: int, seconds: float = 120) -> None:
    log, deadline = folder / "experiment_log.jsonl", time.monotonic() + seconds
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"no {count} steps within {seconds} s"
        time.sleep(0.05)
