# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_config_changes.py
"""The keys that a resumed run has with other values than before."""

import json
from pathlib import Path

import pytest

from verl.trainer.config import PPOConfig, load_config
from verl.trainer.config_changes import config_changes
from verl.trainer.tracking import Tracker
from verl.utils.checkpoint import ResumePoint


@pytest.fixture
def changes(tmp_path: Path):
    """The changes between two lists of overrides, the first of which is written as a run writes it."""

    def config_of(overrides: list[str]) -> PPOConfig:
        return load_config([f"trainer.save_checkpoint_path={tmp_path}", *overrides])

    def compare(before: list[str], now: list[str], folder: Path = tmp_path) -> list[str]:
        with Tracker(["file"], config_of(before).to_dict(), "digits", "demo", tmp_path, total_steps=1):
            pass
        return config_changes(config_of(now), ResumePoint(str(folder / "global_step_5"), 5))

    return compare


def test_changed_keys_are_told_with_both_values(changes) -> None:
    assert changes([], ["algorithm.enable_token_weights=true", "data.min_pixels=null"]) == [
        "data.min_pixels=null, which was 262144",
        "algorithm.enable_token_weights=true, which was false",
    ]
    given = ["worker.reward.reward_function_kwargs={bonus: 1}", "algorithm.token_weight_clip=[1,1]"]
    assert changes(given, ["algorithm.token_weight_clip=[0.5,2.0]"]) == [
        "worker.reward.reward_function_kwargs={}, which was {'bonus': 1}",
        "algorithm.token_weight_clip=[0.5,2.0], which was [1.0,1.0]",
    ]


def test_the_same_configuration_has_no_changes_and_secrets_are_not_shown(changes) -> None:
    given = ["worker.reward.reward_function_kwargs={api_key: sesame}", "algorithm.token_weight_clip=[0.3,2]"]
    assert changes(given, given) == []
    assert changes(given, [given[0].replace("sesame", "simsim"), given[1], "trainer.find_last_checkpoint=true"]) == []


def test_a_checkpoint_of_another_run_and_a_run_without_the_file_have_no_changes(changes, tmp_path: Path) -> None:
    assert changes([], ["data.seed=9"], folder=tmp_path / "other") == []
    config = load_config([f"trainer.save_checkpoint_path={tmp_path / 'new'}"])
    assert config_changes(config, ResumePoint(str(tmp_path / "new" / "global_step_5"), 5)) == []
    assert config_changes(config, None) == []


def test_a_damaged_file_is_told_and_keys_of_another_release_are_left_out(tmp_path: Path) -> None:
    config = load_config([f"trainer.save_checkpoint_path={tmp_path}"])
    point = ResumePoint(str(tmp_path / "global_step_5"), 5)
    file = tmp_path / "experiment_config.json"
    file.write_text(json.dumps({"data": {"seed": 7, "gone": 1}, "trainer": None}))
    assert config_changes(config, point) == ["data.seed=1, which was 7"]
    file.write_text('{"data":')
    (told,) = config_changes(config, point)
    assert told.startswith(f"what may have changed is unknown: {file} is damaged")
