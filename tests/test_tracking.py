# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_tracking.py

import json
import logging
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from verl.trainer.config import TrainerConfig, load_config
from verl.trainer.main import prepare
from verl.trainer.sinks import Sink, nested, read_log
from verl.trainer.tracking import RUN_IDS, SINKS, Tracker, require_loggers
from verl.utils.checkpoint import ResumePoint

ROOT = Path(__file__).resolve().parent.parent

CONFIG = {"trainer": {"logger": ["file"], "max_steps": None}, "worker": {"actor": {"optim": {"lr": 1e-6}}}}
SAMPLES = [("What digit?", "It is 7.", "7", 1.0), ("And this?", "九", "9", 0.0)]


class ServedSink(Sink):
    """A logger whose server numbers its runs and is never there again after the start."""

    HAS_SERVER = True

    def __init__(self, run):
        super().__init__(run)
        self.run_id = run.kept_ids.get("served") or uuid.uuid4().hex

    def log(self, metrics, step):
        raise ConnectionError(f"no answer at step {step}")


class BrokenSink(Sink):
    """A logger that does not start."""

    def __init__(self, run):
        raise PermissionError("no key")


class ListeningSink(Sink):
    """A logger that keeps what it hears."""

    heard: list

    def __init__(self, run):
        super().__init__(run)
        ListeningSink.heard = []

    def log(self, metrics, step):
        self.heard.append((dict(metrics), step))

    def close(self, failed):
        self.heard.append(("closed", failed))


@pytest.fixture
def more_sinks(monkeypatch):
    """Loggers joined as a user joins one."""
    for name, sink in (("served", ServedSink), ("broken", BrokenSink), ("listening", ListeningSink)):
        monkeypatch.setitem(SINKS, name, sink)


def make_tracker(tmp_path, *loggers, resume_step=0, resume_from="run"):
    point = (
        ResumePoint(str(tmp_path / resume_from / f"global_step_{resume_step}"), resume_step) if resume_step else None
    )
    return Tracker(loggers, CONFIG, "digits", "demo", tmp_path / "run", total_steps=4, resume_point=point)


def read_lines(tmp_path):
    text = (tmp_path / "run" / "experiment_log.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_config_file_is_for_its_owner_alone_whatever_was_there(tmp_path):
    config = tmp_path / "experiment_config.json"
    config.write_text("of an earlier run")
    config.chmod(0o644)
    with Tracker(["file"], CONFIG, "digits", "demo", tmp_path, total_steps=1):
        pass
    assert config.stat().st_mode & 0o777 == 0o600
    assert json.loads(config.read_text()) == CONFIG


def test_an_unknown_logger_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.logger=wanbd .*console, file, mlflow, swanlab, tensorboard, wandb"):
        make_tracker(tmp_path, "file", "wanbd")
    assert not (tmp_path / "run").exists()


def test_the_loggers_are_those_that_the_configuration_offers():
    with pytest.raises(ValueError, match=f"whose items are among {', '.join(SINKS)};"):
        TrainerConfig(logger=["wanbd"])
    assert TrainerConfig(logger=list(SINKS)).logger == list(SINKS)


def test_a_library_that_is_not_installed_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    """A folder with the library's name in the working folder, where wandb writes its runs, does not hide that."""
    monkeypatch.setitem(SINKS, "swanlab", type("Absent", (Sink,), {"LIBRARY": "no_such_library"}))
    monkeypatch.setitem(SINKS, "wandb", type("Absent", (Sink,), {"LIBRARY": "folder_of_runs"}))
    (tmp_path / "folder_of_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as caught:
        require_loggers(["console", "swanlab", "wandb", "tensorboard"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for line, name, library in zip(lines, ("swanlab", "wandb"), ("no_such_library", "folder_of_runs"), strict=True):
        assert line.startswith(f"trainer.logger={name} needs the package {library}, which is not installed")
        assert f"pip install -e '.[{name}]'" in line
        assert f'"{name}": [' in (ROOT / "setup.py").read_text()


def test_a_missing_library_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(SINKS, "mlflow", type("Absent", (Sink,), {"LIBRARY": "no_such_library"}))
    (tmp_path / "reward.py").write_text("def main(reward_inputs): ...\n")
    config = load_config(
        [
            "data.train_files=org/set@train",
            "data.val_files=org/set@test",
            "worker.actor.model.model_path=org/model",
            "worker.rollout.name=hf",
            f"worker.reward.reward_function={tmp_path}/reward.py",
            "trainer.logger=[console,mlflow]",
        ]
    )
    with pytest.raises(ValueError, match="trainer.logger=mlflow needs the package no_such_library"):
        prepare(config)


def test_a_logger_that_cannot_start_is_named_and_the_others_are_closed(tmp_path, more_sinks):
    with pytest.raises(PermissionError, match="no key") as caught:
        make_tracker(tmp_path, "listening", "broken")
    assert caught.value.__notes__ == ["The logger that could not start is trainer.logger=broken."]
    assert ListeningSink.heard == [("closed", True)]


def test_a_server_that_is_gone_costs_its_own_reports_and_nothing_else(tmp_path, more_sinks, caplog):
    with make_tracker(tmp_path, "served", "listening") as tracker:
        for step in (1, 2):
            tracker.log({"reward/overall": 0.5}, step)
    assert ListeningSink.heard == [({"reward/overall": 0.5}, 1), ({"reward/overall": 0.5}, 2), ("closed", False)]
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ["trainer.logger=served failed" in record.getMessage() for record in failures] == [True, True]
    assert "ConnectionError: no answer at step 2" in caplog.text


def test_a_logger_without_a_server_fails_with_the_run(tmp_path, more_sinks):
    with (
        pytest.raises(
            RuntimeError, match=r"experiment_log.jsonl could not be written \(Is a directory; .* .iB free\)"
        ),
        make_tracker(tmp_path, "listening", "file") as tracker,
    ):
        (tmp_path / "run" / "experiment_log.jsonl").unlink()
        (tmp_path / "run" / "experiment_log.jsonl").mkdir()
        tracker.log({"a": 1}, step=1)
    assert ListeningSink.heard[-1] == ("closed", True)


def test_ids_at_the_servers_are_kept_by_a_run_that_goes_on_and_by_no_other(tmp_path, more_sinks):
    def ids_after(*loggers, **start):
        make_tracker(tmp_path, *loggers, **start).close()
        path = tmp_path / "run" / RUN_IDS
        return json.loads(path.read_text()) if path.exists() else {}

    first = ids_after("served")
    assert set(first) == {"served"}
    assert ids_after("served", resume_step=2) == first
    assert ids_after("console", resume_step=2) == first, "a logger left out once is not forgotten"
    assert ids_after("served", resume_step=2) == first
    fork = ids_after("served", resume_step=2, resume_from="another_run")
    assert fork != first
    fresh = ids_after("served")
    assert fresh not in (first, fork)
    assert ids_after("console") == {}
    assert ids_after("served", resume_step=2) not in (first, fork, fresh)


def test_log_lines_are_the_metrics_split_at_the_slash(tmp_path):
    with make_tracker(tmp_path, "file") as tracker:
        tracker.log({"reward/overall": np.float32(0.5), "critic/score/max": torch.tensor(1.0), "n": 3}, step=1)
        tracker.log({"reward/overall": np.float64(0.75)}, step=2)
    assert read_lines(tmp_path) == [
        {"step": 1, "reward": {"overall": 0.5}, "critic": {"score": {"max": 1.0}}, "n": 3.0},
        {"step": 2, "reward": {"overall": 0.75}},
    ]
    assert json.loads((tmp_path / "run" / "experiment_config.json").read_text()) == CONFIG


@pytest.mark.parametrize("resume_step", [0, 1])
def test_a_run_that_only_validates_leaves_the_files_of_a_run_that_trains_alone(tmp_path, more_sinks, resume_step):
    """It may start while the other is in the middle of a line."""
    folder = tmp_path / "run"
    with make_tracker(tmp_path, "file", "served") as tracker:
        tracker.log({"reward/overall": 0.5}, step=1)
    half = folder / "experiment_log.jsonl"
    half.write_text(half.read_text() + '{"step": 2, "rew')
    kept = {name: (folder / name).read_bytes() for name in ("experiment_config.json", "run_ids.json")}
    assert kept["run_ids.json"] != b"{}"
    log = half.read_bytes()
    point = ResumePoint(str(folder / f"global_step_{resume_step}"), resume_step) if resume_step else None
    with Tracker(
        ["file"], {"trainer": {}}, "digits", "demo", folder, total_steps=4, resume_point=point, only_validates=True
    ) as tracker:
        tracker.log({"val/reward_score": 0.5}, step=resume_step + 1)
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert half.read_bytes().startswith(log)
    assert not (folder / "experiment_log.cut.jsonl").exists()
    assert read_log(folder)[resume_step + 1]["val/reward_score"] == 0.5


def test_every_line_is_on_disk_before_the_run_ends(tmp_path):
    tracker = make_tracker(tmp_path, "file")
    tracker.log({"reward/overall": 0.5}, step=1)
    assert len(read_lines(tmp_path)) == 1


def test_generations_are_written_as_tagged_lines_with_a_blank_one_between(tmp_path):
    with make_tracker(tmp_path, "file") as tracker:
        tracker.log_generations(SAMPLES, step=2)
    assert (tmp_path / "run" / "generations.log").read_text("utf-8") == (
        "[prompt] What digit?\n[output] It is 7.\n[ground_truth] 7\n[score] 1.0\n\n"
        "[prompt] And this?\n[output] 九\n[ground_truth] 9\n[score] 0.0\n\n"
    )


def test_every_validation_is_a_line_of_the_held_out_rewards_and_nan_is_null(tmp_path):
    for step, resume_step in ((0, 0), (2, 2)):
        with make_tracker(tmp_path, "file", resume_step=resume_step) as tracker:
            tracker.log_val_rewards({"overall": [0.5, float("nan")], "accuracy": [np.float64(1), 0]}, step)
    rewards = {"overall": [0.5, None], "accuracy": [1.0, 0.0]}
    lines = (tmp_path / "run" / "val_rewards.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, "rewards": rewards} for step in (0, 2)]


def test_a_resumed_run_appends_and_a_fresh_one_keeps_what_was_there_beside(tmp_path):
    for resume_step, step in ((0, 1), (1, 2)):
        with make_tracker(tmp_path, "file", resume_step=resume_step) as tracker:
            tracker.log({"reward/overall": 0.5}, step)
            tracker.log_generations(SAMPLES, step)
    lines = (tmp_path / "run" / "experiment_log.jsonl").read_text()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]

    cut = tmp_path / "run" / "experiment_log.cut.jsonl"
    for start in ({}, {"resume_step": 2, "resume_from": "another_run"}):
        with make_tracker(tmp_path, "file", **start) as tracker:
            assert (tmp_path / "run" / "experiment_log.jsonl").read_text() == lines, "a run that only starts"
            first = start.get("resume_step", 0)
            tracker.log({"val/reward_score": 0.5}, step=first)
            tracker.log({"reward/overall": 0.5}, step=first + 1)
            tracker.log({"reward/overall": 0.5}, step=first + 2)
        assert [line["step"] for line in read_lines(tmp_path)] == [first, first + 1, first + 2]
        assert cut.read_text() == lines
        cut.unlink()
        lines = (tmp_path / "run" / "experiment_log.jsonl").read_text()
    assert (tmp_path / "run" / "generations.log").read_text("utf-8").count("[prompt]") == 4


def test_a_disk_without_room_is_told_with_the_path_and_what_is_free(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"generations.log could not be written \(No space left on device; its file"
    ):
        with make_tracker(tmp_path, "file") as tracker:
            (tmp_path / "run" / "generations.log").unlink()
            (tmp_path / "run" / "generations.log").symlink_to("/dev/full")
            tracker.log_generations(SAMPLES, 1)


@pytest.mark.parametrize("end", ["", '{"step": 5, "rew', '{"step": 2}', "[]\n"])
def test_lines_past_the_checkpoint_and_halves_of_lines_are_moved_out_of_the_log(end, tmp_path):
    """Steps 1 to 4, a line cut short by a full disk, and a resume from step 2."""
    with make_tracker(tmp_path, "file") as tracker:
        for step in (1, 2, 2, 3, 4):
            tracker.log({"reward/overall": step / 8}, step)
    log = tmp_path / "run" / "experiment_log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text(log.read_text() + end)
    with make_tracker(tmp_path, "file", resume_step=2) as tracker:
        tracker.log({"val/reward_score": 0.5}, step=2)
        assert log.read_text().splitlines()[:5] == lines, "a run that only validates takes no step again"
        tracker.log({"reward/overall": 0.5}, step=3)
    assert log.read_text().splitlines()[:3] == lines[:3]
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 2, 2, 3]
    cut = (tmp_path / "run" / "experiment_log.cut.jsonl").read_text().splitlines()
    assert cut == [*end.splitlines(), *lines[3:]]


def test_no_metric_is_lost_whatever_the_names_nest_in():
    """A reward function that returns `acc` beside `acc/easy` must not end the run."""
    metrics = {"reward/acc/easy": 1.0, "reward/acc": 2.0, "reward/acc/hard/er": 3.0, "a": 4.0, "a/b/c": 5.0, "/x": 6.0}
    expected = {"reward": {"acc/easy": 1.0, "acc": 2.0, "acc/hard/er": 3.0}, "a": 4.0, "a/b/c": 5.0, "": {"x": 6.0}}
    assert nested(metrics) == expected
    assert nested(dict(reversed(metrics.items()))) == expected


def test_libraries_are_imported_only_when_they_are_asked_for(tmp_path):
    program = (
        "import sys; from verl.trainer.tracking import SINKS, Tracker, require_loggers;"
        f"require_loggers(SINKS); Tracker(['console', 'file'], {{}}, 'p', 'e', {str(tmp_path)!r}, 1).close();"
        "loaded = {'torch', *(sink.LIBRARY for sink in SINKS.values())} & set(sys.modules); assert not loaded, loaded"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_a_number_that_is_not_finite_is_null_in_the_log_since_json_has_no_word_for_it(tmp_path):
    with Tracker(["file"], {}, "project", "run", tmp_path, total_steps=1) as tracker:
        tracker.log({"actor/grad_norm": float("nan"), "actor/lr": 1.0, "actor/pg_loss": float("-inf")}, 1)
    line = (tmp_path / "experiment_log.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "actor": {"grad_norm": None, "lr": 1.0, "pg_loss": None},
    }
