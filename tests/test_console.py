# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_console.py
"""What the console shows of a run: the line of a step, a validation's bar, the table at the end."""

import io
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from verl.trainer.config import load_config
from verl.trainer.console import Figures
from verl.trainer.run_state import RunState
from verl.trainer.run_summary import duration
from verl.trainer.sinks import WrittenFile
from verl.trainer.tracking import Tracker
from verl.utils.checkpoint import DATALOADER_FILE, ResumePoint

SAMPLES = [("What digit?", "It is 7.", "7", 1.0)]

STEP = {"reward/overall": 0.5, "perf/time_per_step": 30.0, "perf/total_num_tokens": 60_000, "perf/throughput": 1000.0}
"""On two devices."""


class Terminal(io.StringIO):
    """A stderr that says it is a terminal, so that the progress bar shows itself."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def make_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tracker]:
    def make(*loggers: str, stderr: io.StringIO, resume_step: int = 0) -> Tracker:
        monkeypatch.setattr(sys, "stderr", stderr)
        folder = tmp_path / "run"
        point = ResumePoint(str(folder / f"global_step_{resume_step}"), resume_step) if resume_step else None
        return Tracker(loggers, {}, "digits", "demo", folder, total_steps=4, resume_point=point)

    return make


def without_time(text: str) -> list[str]:
    return re.sub(r"^\d+ s, ", "N s, ", text, flags=re.MULTILINE).splitlines()


def test_a_pipe_gets_one_line_a_step_two_a_validation_and_a_table_of_the_run(make_tracker, tmp_path: Path) -> None:
    with make_tracker("console", "file", stderr=io.StringIO()) as tracker:
        tracker.add_files(lambda: [WrittenFile("nothing", tmp_path / "is_not_there")])
        tracker.log({"val/reward_score": 0.25, "val/accuracy_reward": 0.2}, step=0)
        tracker.phase("gen")
        tracker.log({**STEP, "vgr/median": 1.5, "response_length/mean": 12.34}, step=1)
        tracker.log({**STEP, "reward/overall": 0.75, "vgr/median": 1.25, "perf/time_per_step": 90.0}, step=2)
        tracker.phase("validation", "validating 510 prompts")
        tracker.validated(0, 510)
        tracker.validated(510, 510)
        tracker.log({"val/reward_score": 0.5, "val/accuracy_reward": 0.6}, step=2)
        tracker.log({**STEP, "reward/overall": 0.625, "vgr/median": 2.0}, step=3)
        tracker.log({**STEP, "val/reward_score": 0.375, "val/accuracy_reward": 0.4, "vgr/median": 1.0}, step=4)
        tracker.note("saved")
    assert without_time(sys.stderr.getvalue()) == [
        "validation at step 0: reward_score 0.250, accuracy_reward 0.200",
        "step 1/4: reward 0.500, held-out accuracy 0.200, VGR 1.500, 2,000 tokens/s, 1 min 30 s left",
        "step 2/4: reward 0.750, held-out accuracy 0.200, VGR 1.250, 667 tokens/s, 2 min left",
        "validating 510 prompts",
        "validation at step 2: reward_score 0.500, accuracy_reward 0.600",
        "step 3/4: reward 0.625, held-out accuracy 0.600, VGR 2.000, 2,000 tokens/s, 50 s left",
        "validation at step 4: reward_score 0.375, accuracy_reward 0.400",
        "step 4/4: reward 0.500, held-out accuracy 0.400, VGR 1.000, 2,000 tokens/s",
        "saved",
        "digits/demo ended at step 4 of 4",
        "N s, 240,000 tokens of prompts and responses in training",
        "",
        "                   start           end             best",
        "reward             0.500 (step 1)  0.500 (step 4)",
        "held-out reward    0.250 (step 0)  0.375 (step 4)  0.500 (step 2)",
        "held-out accuracy  0.200 (step 0)  0.400 (step 4)  0.600 (step 2)",
        "VGR                1.500 (step 1)  1.000 (step 4)",
        "",
        "files",
        f"  configuration     {tmp_path}/run/experiment_config.json",
        f"  metrics           {tmp_path}/run/experiment_log.jsonl",
        f"  generations       {tmp_path}/run/generations.log",
        f"  held-out rewards  {tmp_path}/run/val_rewards.jsonl",
    ]


def test_what_a_run_does_not_measure_is_not_shown(make_tracker) -> None:
    """No accuracy, no attention, nothing done: the held-out figure is a reward, and there is no table of nothing."""
    with make_tracker("console", stderr=io.StringIO()) as tracker:
        tracker.log({"val/reward_score": 0.25}, step=0)
        tracker.log({"reward/overall": 0.5}, step=1)
    assert "step 1/4: reward 0.500, held-out reward 0.250" in sys.stderr.getvalue().splitlines()
    with make_tracker("console", stderr=io.StringIO()):
        pass
    assert without_time(sys.stderr.getvalue()) == [
        "digits/demo ended at step 0 of 4",
        "N s, 0 tokens of prompts and responses in training",
    ]


def test_a_run_that_fails_gets_its_table_too(make_tracker) -> None:
    with pytest.raises(SystemExit), make_tracker("console", stderr=io.StringIO(), resume_step=2) as tracker:
        tracker.log(STEP, step=3)
        raise SystemExit(143)
    lines = sys.stderr.getvalue().splitlines()
    assert lines[1] == "digits/demo broke off at step 3 of 4, resumed at 2"
    assert lines[-1] == "reward  0.500 (step 3)  0.500 (step 3)"


def test_the_time_left_follows_from_the_last_ten_steps() -> None:
    figures = Figures(total_steps=100)
    for step in range(1, 21):
        figures.take({"perf/time_per_step": 1000.0 if step <= 10 else float(step)}, step)
    assert figures.text() == "20 min 40 s left"  # 80 steps of the mean of 11 to 20, 15.5 s


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599, "59 min 59 s"), (12060, "3 h 21 min"), (176400, "2 d 1 h")],
)
def test_a_duration_has_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_terminal_sees_a_bar_with_the_phase_and_the_latest_figures(make_tracker, monkeypatch) -> None:
    terminal, handler = Terminal(), logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with make_tracker("console", stderr=terminal, resume_step=1) as tracker:
        assert "starting, step 1/4" in terminal.getvalue(), "one of four steps lies behind a run resumed after step 1"
        tracker.phase("update_actor", "updating")
        logging.getLogger().warning("a message")
        tracker.log({**STEP, "val/reward_score": 0.25}, step=2)
        tracker.log_generations(SAMPLES, step=2)
    shown = terminal.getvalue()
    assert "update_actor, step 1/4" in shown and "updating" not in shown
    assert "\ra message\n" in re.sub(" {2,}", "", shown), "a log message begins its own line, above the bar"
    assert logging.getLogger().handlers == [handler]
    assert "update_actor, step 2/4" in shown
    assert "reward 0.500, held-out reward 0.250, 2,000 tokens/s, 1 min left" in shown
    assert "validation at step 2: reward_score 0.250" in shown
    assert (
        "step 2, held-out sample 1 of 1, score 1.000\n[prompt] What digit?\n[output] It is 7.\n[ground_truth] 7"
        in shown
    )
    assert shown.index("digits/demo ended at step 2 of 4, resumed at 1") > shown.rindex("update_actor")


def test_the_line_of_a_step_tells_vgr_and_the_spread_of_the_weights(make_tracker) -> None:
    weights = {"vgr/median": 0.9, "token_weights/mean": 0.95, "token_weights/std": 0.625}
    with make_tracker("console", stderr=io.StringIO()) as tracker:
        tracker.log({**STEP, **weights}, step=2)
    assert "VGR 0.900, weights 0.95 ± 0.62," in sys.stderr.getvalue()


def test_a_validation_has_a_bar_of_its_own_that_goes_when_it_is_done(make_tracker) -> None:
    with make_tracker("console", stderr=Terminal()) as tracker:
        tracker.phase("validation", "validating 5 prompts")
        for num_done in (0, 2, 4, 5):
            tracker.validated(num_done, 5)
        shown = sys.stderr.getvalue()
        for num_done in (0, 2, 4, 5):
            assert f"validation {num_done}/5 prompts" in shown
        after = shown.rpartition("5/5 prompts")[2]
        assert re.search(r"\r +\x1b\[A", after), "its line is cleared"
        tracker.validated(0, 5)  # the next one begins anew, and an error breaks it off
    assert sys.stderr.getvalue().count("validation 0/5 prompts") >= 2


def test_of_many_checkpoints_the_best_and_the_last_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"global_step_{step}").mkdir()
        (tmp_path / f"global_step_{step}" / DATALOADER_FILE).touch()
    state = RunState(load_config([f"trainer.save_checkpoint_path={tmp_path}"]))
    state.best_step, state.last_saved_step = 2, 4
    tracker = ("checkpoint tracker", tmp_path / "checkpoint_tracker.json")
    best, last = (("best checkpoint", tmp_path / "global_step_2"), ("last checkpoint", tmp_path / "global_step_4"))
    assert state.files() == [best, last, ("2 other checkpoints", tmp_path), tracker]
    state.best_step = 4
    assert state.files() == [last, ("3 other checkpoints", tmp_path), tracker]
