# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_standstill.py
"""Runs that get nowhere: their optimizer steps are skipped, or there is nothing to learn from."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.pool import run_shared
from tests.test_stop_request import quiet
from tests.test_training_run import ROOT, is_changed, lines_of, weights_at
from verl.trainer.config import load_config
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.standstill import SKIPPED_SAMPLES

ROW = 5
"""In the second half of what the first of two workers has of 16 rows, so in the second of two mini-batches."""


def poison(monkeypatch: pytest.MonkeyPatch, rows: list[int], steps: list[int]) -> list[list[str]]:
    """Gives some rows an advantage that is no number; returns a list that fills with each step's uids."""
    update_actor, uids = RayDAPOTrainer._update_actor, []

    def update(trainer: RayDAPOTrainer, batch, record) -> None:
        uids.append(list(batch.non_tensor_batch["uid"]))
        if record.step in steps:
            batch.batch["advantages"][rows] = torch.nan
        update_actor(trainer, batch, record)

    monkeypatch.setattr(RayDAPOTrainer, "_update_actor", update)
    return uids


def test_skipped_optimizer_steps_are_counted_and_their_samples_named(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch
) -> None:
    """On two workers, each with half of every mini-batch."""
    uids = poison(monkeypatch, [ROW], steps=[1])
    settings = ["trainer.n_gpus_per_node=2", "trainer.max_steps=2", "trainer.max_skipped_steps=1"]
    run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path, *settings)))
    records = [record for record in lines_of(tmp_path / "experiment_log.jsonl") if "actor" in record]
    assert [record["actor"]["skipped_steps"] for record in records] == [1, 0]
    named = lines_of(tmp_path / SKIPPED_SAMPLES)
    assert {(line["step"], line["model"], line["mini_batch"]) for line in named} == {(1, "actor", 1)}
    skipped_rows = [4, 5, 6, 7, 12, 13, 14, 15]
    assert sum(line["responses"] for line in named) == len(skipped_rows)
    assert {line["uid"] for line in named} == {uids[0][row] for row in skipped_rows}
    assert all(line["prompt"] for line in named)


def test_steps_that_are_all_skipped_end_the_run_and_are_not_saved(
    tiny_model_path: str,
    data_files: list[str],
    tmp_path: Path,
    ray_cluster,
    monkeypatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table at the end says where samples and checkpoints are; the first of these is as good as the last."""
    poison(monkeypatch, [0, 8], steps=[2, 3])
    settings = ["trainer.max_steps=5", "trainer.save_freq=1", "trainer.max_skipped_steps=2", "trainer.val_freq=1"]
    settings.append("trainer.logger=[console,file]")
    message = r"in trainer.max_skipped_steps=2 steps in a row, up to step 3, every optimizer step of the actor was "
    with pytest.raises(RuntimeError, match=message) as ended:
        run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path, *settings)))
    assert len(str(ended.value)) < 500
    summary = capsys.readouterr().err.partition("easy_r1/demo broke off at step 2 of 5\n")[2]
    for content, name in (
        ("best checkpoint", "global_step_1"),
        ("last checkpoint", "global_step_2"),
        ("samples of skipped updates", SKIPPED_SAMPLES),
    ):
        assert re.search(rf"^  {content} +{tmp_path}/{name}$", summary, re.MULTILINE), summary
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == ["global_step_1", "global_step_2"]
    assert not is_changed(weights_at(tmp_path, 1), weights_at(tmp_path, 2))
    assert json.loads((tmp_path / "checkpoint_tracker.json").read_text())["last_global_step"] == 2


def test_steps_without_signal_are_counted_and_told_once(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, caplog
) -> None:
    reward = f"worker.reward.reward_function={ROOT}/tests/rewards.py:praise_all"
    settings = [reward, "trainer.max_uninformative_steps=2"]
    run_shared(load_config(quiet(tiny_model_path, data_files, tmp_path, *settings)))
    records = [record for record in lines_of(tmp_path / "experiment_log.jsonl") if "actor" in record]
    assert [record["actor"]["uninformative_steps"] for record in records] == [1, 2, 3]
    assert caplog.text.count("in 2 steps in a row, up to step 2, every advantage was 0") == 1
    assert caplog.text.count("every advantage was 0") == 1
