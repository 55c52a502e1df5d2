# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_checkpoint_names.py

import contextlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest

from verl.utils.checkpoint import (
    CHECKPOINT_TRACKER,
    DATALOADER_FILE,
    extra_state_file,
    find_latest_ckpt,
    find_resume_point,
    model_file,
    optim_file,
    read_kl_coef,
    remove_obsolete_ckpt,
    step_folder,
    step_of,
    write_kl_coef,
    write_tracker,
)
from verl.utils.checkpoint_folder import publish, settle_checkpoints, unfinished_folder


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


def test_a_checkpoint_that_cannot_be_removed_is_a_warning_and_the_others_are_removed(tmp_path, caplog):
    """Here because it is a file; on NFS because another program has one of its files open."""
    make_folders(tmp_path, [10, 20, 30])
    (tmp_path / "global_step_5").write_text("no folder")
    remove_obsolete_ckpt(str(tmp_path), global_step=30, best_global_step=None, save_limit=1)
    assert steps_on_disk(tmp_path) == [5, 30]
    (told,) = caplog.messages
    assert told.startswith(f"{tmp_path}/global_step_5 could not be removed")


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


@pytest.mark.parametrize(
    ("tracker", "problem"),
    [
        (None, "does not exist"),
        ("", "is not JSON"),
        ('{"last_global_step": 1', "is not JSON"),
        ("[]", "has no last_global_step"),
        ('{"last_global_step": "10"}', "has no last_global_step"),
        ('{"last_global_step": 30}', "names .*global_step_30, which does not exist"),
        ('{"last_global_step": 10, "best_val_reward_score": "high"}', "has a best_val_reward_score of 'high'"),
    ],
)
def test_without_a_tracker_to_rely_on_the_newest_whole_checkpoint_is_the_latest(tracker, problem, tmp_path, caplog):
    """Step 100 is newer, as a number; it lacks the file that is written last."""
    make_folders(tmp_path, [9, 10, 100])
    for step in (9, 10):
        (tmp_path / f"global_step_{step}" / DATALOADER_FILE).touch()
    if tracker is not None:
        (tmp_path / CHECKPOINT_TRACKER).write_text(tracker)
    folder, contents = find_latest_ckpt(str(tmp_path))
    assert folder == step_folder(str(tmp_path), 10)
    assert contents["last_global_step"] == 10
    (warning,) = caplog.messages
    assert re.search(problem, warning) and "the newest whole checkpoint is" in warning


def test_a_best_checkpoint_that_is_gone_is_forgotten_with_the_last(tmp_path):
    for step in (5, 10):
        make_folders(tmp_path, [step])
        (tmp_path / f"global_step_{step}" / DATALOADER_FILE).touch()
    write_tracker(str(tmp_path), last_global_step=30, best_global_step=5, best_val_reward_score=0.5)
    assert find_latest_ckpt(str(tmp_path))[1]["best_val_reward_score"] == 0.5
    write_tracker(str(tmp_path), last_global_step=30, best_global_step=20, best_val_reward_score=0.5)
    assert find_latest_ckpt(str(tmp_path))[1]["best_val_reward_score"] is None


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize(
    "moment", ["before the files", "before the rename", "after it", "while the old one goes", None]
)
def test_whenever_a_save_is_cut_off_one_whole_checkpoint_remains(moment, replaces, tmp_path, monkeypatch):
    folder = step_folder(str(tmp_path), 5)
    if replaces:
        make_folders(tmp_path, [5])
        Path(folder, "weights").write_text("old")
    rename, rmtree = os.rename, shutil.rmtree

    def cut_rename(source, target):
        if source == unfinished and moment == "before the rename":
            raise KeyboardInterrupt
        rename(source, target)
        if source == unfinished and moment == "after it":
            raise KeyboardInterrupt

    def cut_rmtree(path, *options):
        if moment == "while the old one goes":
            Path(path, "weights").unlink()
            raise KeyboardInterrupt
        rmtree(path, *options)

    unfinished = unfinished_folder(folder)
    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(os, "rename", cut_rename)
        patched.setattr(shutil, "rmtree", cut_rmtree)
        if moment == "before the files":
            raise KeyboardInterrupt
        Path(unfinished, "weights").write_text("new")
        publish(folder)
    settle_checkpoints(str(tmp_path))
    found = [path.read_text() for path in tmp_path.glob("global_step_5/weights")]
    is_too_early = moment in ("before the files", "before the rename")
    assert found == ((["old"] if replaces else []) if is_too_early else ["new"])
    assert {path.name for path in tmp_path.iterdir()} <= {"global_step_5"}


def test_a_link_in_the_place_of_a_checkpoint_is_replaced_and_its_target_left_alone(tmp_path):
    """Also where the run ended before the link was removed."""
    target = tmp_path / "elsewhere"
    target.mkdir()
    folder = tmp_path / "run" / "global_step_5"
    for name in ("global_step_5", "global_step_5.replaced"):
        unfinished_folder(str(folder))
        folder.with_name(name).symlink_to(target)
        publish(str(folder))
        settle_checkpoints(str(tmp_path / "run"))
        assert folder.is_dir() and not folder.is_symlink() and target.is_dir()
        assert os.listdir(tmp_path / "run") == ["global_step_5"]


def test_a_tracker_is_not_complained_of_where_the_checkpoint_is_named(tmp_path, caplog):
    make_folders(tmp_path, [7])
    point = find_resume_point(str(tmp_path), str(tmp_path / "global_step_7"), find_last=True)
    assert point.step == 7 and point.best_step is None
    assert find_resume_point(str(tmp_path), None, find_last=False) is None
    assert caplog.text == ""


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


@pytest.mark.parametrize(
    "content", ["", "{}", "[0.1]", '{"kl_coef": "0.1"}', '{"kl_coef": -0.1}', '{"kl_coef": NaN}', '{"kl_coef": true}']
)
def test_a_kl_coefficient_that_cannot_be_is_refused_by_the_file(content, tmp_path):
    folder = tmp_path / "global_step_7"
    folder.mkdir()
    (folder / "kl_coef.json").write_text(content)
    with pytest.raises(ValueError, match=f"{folder}/kl_coef.json .*global_step_7 cannot be resumed"):
        read_kl_coef(str(folder))
