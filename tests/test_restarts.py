# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_restarts.py
"""Runs that lose processes: how often they go on by themselves, from where, and to which weights."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from tests.pool import pids_of, run_shared
from tests.test_stop_request import ask, quiet
from tests.test_training_run import ROOT, is_changed, lines_of, weights_at
from verl.single_controller.lost_processes import ProcessesLost
from verl.trainer.config import load_config
from verl.trainer.ray_trainer import RayDAPOTrainer

SETTINGS = (
    "algorithm.online_filtering=true",
    "algorithm.filter_key=overall",
    "algorithm.filter_low=0.5",
    "algorithm.filter_high=100",
    "algorithm.enable_token_weights=true",
    "worker.rollout.collect_attentions=true",
    "trainer.save_freq=1",
    "trainer.max_steps=4",
)
"""Dynamic sampling, which draws a step's prompts in several goes, and VGR."""


def lose(
    monkeypatch: pytest.MonkeyPatch, phase: str, losses: dict[int, list[Callable[[RayDAPOTrainer], None]]]
) -> None:
    """Has something happen before a phase of some steps; the n-th time that a step comes to it, the n-th thing."""
    method = getattr(RayDAPOTrainer, phase)

    def lossy(trainer: RayDAPOTrainer, *args):
        (record,) = (arg for arg in args if hasattr(arg, "step"))
        if losses.get(record.step):
            losses[record.step].pop(0)(trainer)
        return method(trainer, *args)

    monkeypatch.setattr(RayDAPOTrainer, phase, lossy)


def kill_worker(trainer: RayDAPOTrainer) -> None:
    os.kill(pids_of(trainer.processes)[0], signal.SIGKILL)


def kill_reward(trainer: RayDAPOTrainer) -> None:
    os.kill(ray.get(trainer.rewards._process._location).pid, signal.SIGKILL)


def steps_in(folder: Path, name: str = "experiment_log.jsonl") -> list[int]:
    return [record["step"] for record in lines_of(folder / name) if "actor" in record]


def test_a_run_that_loses_a_worker_and_the_reward_function_ends_with_the_weights_of_one_that_does_not(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch, caplog
) -> None:
    """The worker is lost in the first step, so that there is nothing to go on from."""
    run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path / "whole", *SETTINGS)))
    lose(monkeypatch, "_update_actor", {1: [kill_worker]})
    lose(monkeypatch, "_rollout", {3: [kill_reward]})
    lossy = quiet(tiny_model_path, data_files, tmp_path / "lossy", *SETTINGS, "trainer.max_restarts=2")
    run_shared(load_config(lossy))
    assert steps_in(tmp_path / "lossy") == steps_in(tmp_path / "whole") == [1, 2, 3, 4]
    assert not is_changed(weights_at(tmp_path / "whole", 4), weights_at(tmp_path / "lossy", 4))
    assert is_changed(weights_at(tmp_path / "whole", 3), weights_at(tmp_path / "whole", 4))
    assert "rank 0 on node" in caplog.text
    assert "The run goes on as it began, since it has saved nothing; restarts left: 1" in caplog.text
    assert "the reward function's process on node" in caplog.text
    assert "The run goes on from the last checkpoint; restarts left: 0" in caplog.text


def test_a_run_goes_on_from_its_own_checkpoint_and_not_from_the_one_that_it_was_to_begin_with(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch
) -> None:
    """Two losses are one too many, and the log has what was done until then."""
    args = [*quiet(tiny_model_path, data_files, tmp_path), "trainer.save_freq=1", "trainer.max_restarts=1"]
    run_shared(load_config([*args, "trainer.max_steps=2"]))
    taken = []
    lose(monkeypatch, "_rollout", {2: [kill_reward, lambda _: taken.append(2)], 3: [kill_reward]})
    begun = [*args, f"trainer.load_checkpoint_path={tmp_path}/global_step_1", "trainer.max_steps=4"]
    with pytest.raises(ProcessesLost, match="the reward function's process") as ended:
        run_shared(load_config(begun))
    assert len(str(ended.value)) < 500
    assert taken == [2], "the second attempt began with the step of an earlier run"
    assert steps_in(tmp_path) == [1, 2]


def test_errors_of_the_reward_function_are_not_tried_again(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, caplog
) -> None:
    reward = f"worker.reward.reward_function={ROOT}/tests/rewards.py:fail_in_training"
    args = quiet(tiny_model_path, data_files, tmp_path, reward, "trainer.max_restarts=3")
    with pytest.raises(RuntimeError, match="no grade for this one"):
        run_shared(load_config(args))
    assert "The run goes on" not in caplog.text


def test_a_run_that_was_asked_to_end_is_not_started_again(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch
) -> None:
    def lose_all(trainer: RayDAPOTrainer) -> None:
        ask(signal.SIGTERM)()
        kill_reward(trainer)

    lose(monkeypatch, "_rollout", {2: [lose_all]})
    with pytest.raises(ProcessesLost):
        run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path, "trainer.max_restarts=3")))
