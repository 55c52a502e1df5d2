# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_checkpoint_names.py

import json
import logging
import os

import pytest

from verl.utils.checkpoint import (
    CHECKPOINT_TRACKER,
    extra_state_file,
    find_latest_ckpt,
    model_file,
    optim_file,
    read_kl_coef,
    remove_obsolete_ckpt,
    step_folder,
    step_of,
    write_kl_coef,
    write_tracker,
)


def make_folders(root, steps):
    for step in steps:
        os.makedirs(os.path.join(step_folder(str(root), step), "actor"))


def steps_on_disk(root):
    return sorted(step_of(entry.path) for entry in os.scandir(root) if entry.name.startswith("global_step_"))


def test_file_names_are_those_that_mergers_and_resuming_runs_look_for():
    assert model_file(8, 3) == "model_world_size_8_rank_3.pt"
    assert optim_file(8, 3) == "optim_world_size_8_rank_3.pt"
    assert extra_state_file(8, 3) == "extra_state_world_size_8_rank_3.pt"


def test_the_step_is_read_back_from_the_folder_it_names():
    assert step_of(step_folder("/runs/demo", 120)) == 120
    assert step_of(step_folder("/runs/global_step_7", 120) + "/") == 120


@pytest.mark.parametrize("path", ["/runs/global_step_5/actor", "/runs/global_step_", "/runs/final"])
def test_a_folder_without_a_step_is_an_error_that_shows_a_right_name(path):
    with pytest.raises(ValueError, match=f"{path}.*global_step_<N>"):
        step_of(path)


@pytest.mark.parametrize(
    ("best", "limit", "kept"),
    [
        (10, 3, [10, 25]),
        (30, 3, [20, 25]),
        (None, 3, [20, 25]),
        (25, 3, [20, 25]),
        (10, 1, [10]),
        (None, 1, []),
        (10, 100, [5, 10, 15, 20, 25]),
        (10, 0, [5, 10, 15, 20, 25]),
        (10, -1, [5, 10, 15, 20, 25]),
    ],
)
def test_the_new_the_best_and_the_newest_older_checkpoints_survive(tmp_path, best, limit, kept):
    """Steps 5..25 on disk and 30 just saved. With limit 3 and best 10: 30, 10, and one more place for 25."""
    make_folders(tmp_path, [5, 10, 15, 20, 25, 30])
    remove_obsolete_ckpt(str(tmp_path), global_step=30, best_global_step=best, save_limit=limit)
    assert steps_on_disk(tmp_path) == [*kept, 30]


def test_steps_are_ordered_as_numbers_not_as_text(tmp_path):
    make_folders(tmp_path, [9, 10, 100, 101])
    remove_obsolete_ckpt(str(tmp_path), global_step=101, best_global_step=None, save_limit=2)
    assert steps_on_disk(tmp_path) == [100, 101]


def test_a_best_step_that_is_gone_takes_no_place(tmp_path):
    make_folders(tmp_path, [20, 25, 30])
    remove_obsolete_ckpt(str(tmp_path), global_step=30, best_global_step=10, save_limit=2)
    assert steps_on_disk(tmp_path) == [25, 30]


def test_later_steps_and_folders_of_other_names_are_not_touched(tmp_path):
    make_folders(tmp_path, [5, 30, 40])
    for name in ("my_global_step_5", "global_step_5_backup", "huggingface"):
        (tmp_path / name).mkdir()
    (tmp_path / "experiment_log.jsonl").write_text("")
    remove_obsolete_ckpt(str(tmp_path), global_step=30, best_global_step=None, save_limit=1)
    assert sorted(os.listdir(tmp_path)) == [
        "experiment_log.jsonl",
        "global_step_30",
        "global_step_40",
        "global_step_5_backup",
        "huggingface",
        "my_global_step_5",
    ]


def test_the_latest_checkpoint_needs_the_tracker_and_the_folder_it_names(tmp_path, caplog):
    root = str(tmp_path)
    make_folders(root, [5])
    assert find_latest_ckpt(root) == (None, {})

    write_tracker(root, last_global_step=10, best_global_step=5, best_val_reward_score=0.25)
    with caplog.at_level(logging.WARNING):
        folder, info = find_latest_ckpt(root)
    assert folder is None
    assert info["best_global_step"] == 5
    assert "global_step_10" in caplog.text
    assert "trainer.load_checkpoint_path" in caplog.text

    make_folders(root, [10])
    assert find_latest_ckpt(root)[0] == os.path.join(root, "global_step_10")


def test_a_tracker_that_holds_the_last_step_alone_is_enough(tmp_path):
    (tmp_path / CHECKPOINT_TRACKER).write_text('{"last_global_step": 10}')
    make_folders(tmp_path, [10])
    assert find_latest_ckpt(str(tmp_path)) == (str(tmp_path / "global_step_10"), {"last_global_step": 10})


def test_the_tracker_holds_the_four_keys_and_leaves_no_other_file(tmp_path):
    write_tracker(str(tmp_path), last_global_step=10, best_global_step=None, best_val_reward_score=None)
    write_tracker(str(tmp_path), last_global_step=20, best_global_step=10, best_val_reward_score=0.123456)
    assert os.listdir(tmp_path) == [CHECKPOINT_TRACKER]
    assert json.loads((tmp_path / CHECKPOINT_TRACKER).read_text()) == {
        "best_global_step": 10,
        "best_val_reward_score": 0.1235,
        "last_global_step": 20,
        "last_actor_path": str(tmp_path / "global_step_20" / "actor"),
    }


@pytest.mark.parametrize("kl_coef", [0.1 + 0.2, 1e-300, 5e8 / 3])
def test_the_kl_coefficient_is_read_back_to_the_last_bit(tmp_path, kl_coef):
    assert read_kl_coef(str(tmp_path)) is None
    write_kl_coef(str(tmp_path), kl_coef)
    assert read_kl_coef(str(tmp_path)) == kl_coef
