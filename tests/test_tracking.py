# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_tracking.py

import io
import json
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from verl.utils.tracking import Tracker, nested

CONFIG = {"trainer": {"logger": ["file"], "max_steps": None}, "worker": {"actor": {"optim": {"lr": 1e-6}}}}
SAMPLES = [("What digit?", "It is 7.", "7", 1.0), ("And this?", "九", "9", 0.0)]


class Terminal(io.StringIO):
    """A stderr that says it is a terminal, so that the progress bar shows itself."""

    def isatty(self):
        return True


def make_tracker(tmp_path, *loggers, resume_step=0):
    return Tracker(loggers, CONFIG, "digits", "demo", tmp_path / "run", total_steps=4, resume_step=resume_step)


def read_lines(tmp_path):
    text = (tmp_path / "run" / "experiment_log.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_an_unknown_logger_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.logger.*wandb.*console.*file.*tensorboard"):
        make_tracker(tmp_path, "file", "wandb")
    assert not (tmp_path / "run").exists()


def test_log_lines_are_the_metrics_split_at_the_slash(tmp_path):
    with make_tracker(tmp_path, "file") as tracker:
        tracker.log({"reward/overall": np.float32(0.5), "critic/score/max": torch.tensor(1.0), "n": 3}, step=1)
        tracker.log({"reward/overall": np.float64(0.75)}, step=2)
    assert read_lines(tmp_path) == [
        {"step": 1, "reward": {"overall": 0.5}, "critic": {"score": {"max": 1.0}}, "n": 3.0},
        {"step": 2, "reward": {"overall": 0.75}},
    ]
    assert json.loads((tmp_path / "run" / "experiment_config.json").read_text()) == CONFIG


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


def test_a_resumed_run_appends_and_a_fresh_one_begins_anew(tmp_path):
    for resume_step, step in ((0, 1), (1, 2)):
        with make_tracker(tmp_path, "file", resume_step=resume_step) as tracker:
            tracker.log({"reward/overall": 0.5}, step)
            tracker.log_generations(SAMPLES, step)
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]
    assert (tmp_path / "run" / "generations.log").read_text("utf-8").count("[prompt]") == 4

    make_tracker(tmp_path, "file").close()
    assert read_lines(tmp_path) == []
    assert (tmp_path / "run" / "generations.log").read_text("utf-8") == ""


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_name_that_is_metric_and_area_at_once_is_an_error(names):
    with pytest.raises(ValueError, match=f"'{names[1]}'.*rename"):
        nested(dict.fromkeys(names, 1.0))


def test_tensorboard_shows_the_scalars_by_name_and_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "board"))
    with make_tracker(tmp_path, "tensorboard") as tracker:
        for step in (1, 2, 3):
            tracker.log({"reward/overall": step / 4}, step)
    with make_tracker(tmp_path, "tensorboard", resume_step=2) as tracker:
        tracker.log({"reward/overall": 0.125}, step=3)

    events = EventAccumulator(str(tmp_path / "board" / "digits" / "demo")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/overall")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.125),
    ]
    assert "_hparams_/experiment" in events.PluginTagToContent("hparams")


def test_tensorboard_is_imported_only_when_asked_for(tmp_path):
    program = (
        "import sys; from verl.utils.tracking import Tracker;"
        f"Tracker(['console', 'file'], {{}}, 'p', 'e', {str(tmp_path)!r}, 1).close();"
        "sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_log_file_gets_one_line_a_step_and_one_a_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with make_tracker(tmp_path, "console") as tracker:
        tracker.log({"val/reward_score": 0.25, "val/accuracy_reward": 0.2}, step=0)
        tracker.phase("gen")
        tracker.log({"reward/overall": 0.5, "response_length/mean": 12.34, "perf/time_per_step": 2.0, "x": 1}, step=1)
        tracker.log({"reward/overall": 0.6}, step=2)
        tracker.note("saved")
    assert sys.stderr.getvalue().splitlines() == [
        "validation at step 0: reward_score 0.250, accuracy_reward 0.200",
        "step 1/4: reward 0.500, held-out 0.250, length 12.3, s/step 2.0",
        "step 2/4: reward 0.600, held-out 0.250, length 12.3, s/step 2.0",
        "saved",
    ]


def test_a_terminal_sees_a_bar_with_the_phase_and_the_latest_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with make_tracker(tmp_path, "console", resume_step=1) as tracker:
        assert "starting:  25%" in sys.stderr.getvalue(), "one of four steps lies behind a run resumed after step 1"
        tracker.phase("update_actor")
        logging.getLogger().warning("a message")
        tracker.log({"reward/overall": 0.5, "val/reward_score": 0.25}, step=2)
        tracker.log_generations(SAMPLES[:1], step=2)
    shown = sys.stderr.getvalue()
    assert "update_actor" in shown
    assert "\ra message\n" in re.sub(" {2,}", "", shown), "a log message begins its own line, above the bar"
    assert logging.getLogger().handlers == [handler]
    assert "2/4" in shown
    assert "reward 0.500, held-out 0.250" in shown
    assert "validation at step 2: reward_score 0.250" in shown
    assert "step 2, sample 1 of 1, score 1.000\n[prompt] What digit?\n[output] It is 7.\n[ground_truth] 7" in shown


def test_a_number_that_is_not_finite_is_null_in_the_log_since_json_has_no_word_for_it(tmp_path):
    with Tracker(["file"], {}, "project", "run", tmp_path, total_steps=1) as tracker:
        tracker.log({"actor/grad_norm": float("nan"), "actor/lr": 1.0, "actor/pg_loss": float("-inf")}, 1)
    line = (tmp_path / "experiment_log.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "actor": {"grad_norm": None, "lr": 1.0, "pg_loss": None},
    }
