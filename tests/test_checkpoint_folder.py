# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_checkpoint_folder.py

import hashlib
import json
import re
from pathlib import Path

import pytest

from verl.utils.checkpoint import (
    damaged_checkpoint,
    find_latest_ckpt,
    find_resume_point,
    is_model_only,
    refuse_to_start_anew,
    step_folder,
    steps_on_disk,
    write_tracker,
)
from verl.utils.checkpoint_folder import (
    MANIFEST,
    find_changes,
    find_damage,
    publish,
    record_files,
    unfinished_folder,
    write_manifest,
)
from verl.utils.writing import require_room, write_json

LEADING_OUT = '{"step": 4, "model_only": false, "saved_at": "", "files": {"%s": {"bytes": 1, "sha256": ""}}}'


def save(root: Path, step: int, model_only: bool = False) -> Path:
    """A checkpoint of three files."""
    folder = Path(step_folder(str(root), step))
    unfinished = Path(unfinished_folder(str(folder)))
    (unfinished / "actor").mkdir()
    for name in ("actor/model.pt", "actor/optim.pt", "dataloader.pt"):
        (unfinished / name).write_text(f"{name} of step {step}")
    records = record_files(unfinished, unfinished / "actor", unfinished / "dataloader.pt")
    write_manifest(str(unfinished), step, model_only, records)
    publish(str(folder))
    return folder


def test_the_manifest_lists_every_other_file_with_its_size_and_sum(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    manifest = json.loads((folder / MANIFEST).read_text())
    others = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert manifest["step"] == 4 and manifest["model_only"] is False
    assert manifest["files"] == {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in others
    }
    assert find_damage(folder) is None and find_changes(folder) is None


@pytest.mark.parametrize(("content", "problem"), [(None, "is missing"), ("", "empty"), ("actor/mod", "cut")])
def test_a_file_that_is_missing_empty_or_cut_is_named_with_the_newest_whole_step_before(
    content: str | None, problem: str, tmp_path: Path
) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    write_tracker(str(tmp_path), last_global_step=6, best_global_step=None, best_val_reward_score=None)
    for step in (4, 6):
        path = Path(step_folder(str(tmp_path), step), "actor", "model.pt")
        path.unlink() if content is None else path.write_text(content)
    assert steps_on_disk(str(tmp_path)) == [2]
    with pytest.raises(ValueError) as refusal:
        find_resume_point(str(tmp_path), None, find_last=True)
    message = str(refusal.value)
    assert message.startswith(f"{path} ") and problem in message and "\n" not in message
    assert "global_step_6 cannot be resumed" in message
    assert f"trainer.load_checkpoint_path={step_folder(str(tmp_path), 2)} goes on" in message
    with pytest.raises(ValueError, match="there is no whole checkpoint before it"):
        raise damaged_checkpoint(step_folder(str(tmp_path), 2), "x")


def test_a_changed_file_of_the_same_size_is_found_by_the_part_of_the_check_that_reads_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    path = folder / "actor" / "optim.pt"
    path.write_text(path.read_text().replace("4", "5"))
    assert find_damage(folder) is None
    found = [find_changes(folder, part, 2) for part in range(2)]
    assert [problem is not None for problem in found] == [False, True]
    assert f"{path} is not the file that was saved" in found[1]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"step": 4}', '{"files": {"a": 1}}', b"\xff\xfe", LEADING_OUT % "/a", LEADING_OUT % "a/../../b"],
)
def test_a_damaged_manifest_is_named(content: str | bytes, tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.match(rf"{folder / MANIFEST} is damaged", find_damage(folder))
    assert steps_on_disk(str(tmp_path)) == []


def test_whether_the_model_alone_was_saved_is_what_the_manifest_says_and_else_what_the_files_do(
    tmp_path: Path,
) -> None:
    assert is_model_only(str(save(tmp_path, 2, model_only=True)))
    folder = save(tmp_path, 4)
    assert not is_model_only(str(folder)), "though no file is named as an optimizer's"
    (folder / MANIFEST).unlink()
    assert is_model_only(str(folder))
    (folder / "actor" / "optim_world_size_1_rank_0.pt").touch()
    assert not is_model_only(str(folder))


def test_without_a_tracker_the_checkpoint_that_was_saved_last_counts(tmp_path: Path) -> None:
    """Step 6 is of a line of steps that was left: the run was taken back to step 2 and went on to step 4."""
    for step in (2, 6, 4):
        save(tmp_path, step)
    assert find_latest_ckpt(str(tmp_path))[0] == step_folder(str(tmp_path), 4)


def test_a_save_without_room_ends_before_it_writes_with_what_is_needed_and_free(tmp_path: Path) -> None:
    folder = step_folder(str(tmp_path), 4)
    require_room(folder, 1)
    with pytest.raises(RuntimeError, match=rf"{folder} needs 1048576.00 GiB, and its file system has [\d.]+ .iB free"):
        require_room(folder, 2**50)
    (tmp_path / "full.json.tmp").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=r"full.json could not be written \(No space left on device; its file"):
        write_json(tmp_path / "full.json", {})
    assert not (tmp_path / "full.json").exists()


def test_steps_of_which_none_is_whole_are_not_begun_anew_beside(tmp_path: Path) -> None:
    for step in (2, 10):
        (save(tmp_path, step) / "actor" / "model.pt").write_text("cut")
    with pytest.raises(ValueError) as refusal:
        find_resume_point(str(tmp_path), None, find_last=True)
    assert f"none of them is whole: {tmp_path}/global_step_10/actor/model.pt has 3 bytes" in str(refusal.value)
    assert "name it with trainer.load_checkpoint_path" in str(refusal.value)
    for step in (2, 10):
        (tmp_path / f"global_step_{step}" / MANIFEST).unlink()
        (tmp_path / f"global_step_{step}" / "dataloader.pt").unlink()
    with pytest.raises(ValueError, match="global_step_10 has neither manifest.json nor dataloader.pt"):
        find_resume_point(str(tmp_path), None, find_last=True)


@pytest.mark.parametrize(
    ("load", "find_last", "is_refused"),
    [
        (None, True, False),
        (None, False, True),
        ("run/global_step_2", False, False),
        ("elsewhere/global_step_9", True, True),
    ],
)
def test_a_run_that_would_start_anew_beside_old_steps_is_told_three_ways(
    load: str | None, find_last: bool, is_refused: bool, tmp_path: Path
) -> None:
    path, load_path = str(tmp_path / "run"), None if load is None else str(tmp_path / load)
    refuse_to_start_anew(path, load_path, find_last)
    (tmp_path / "run" / "global_step_2.unfinished").mkdir(parents=True)
    refuse_to_start_anew(path, load_path, find_last)
    (tmp_path / "run" / "global_step_2").mkdir()
    if not is_refused:
        refuse_to_start_anew(path, load_path, find_last)
        return
    with pytest.raises(ValueError) as refusal:
        refuse_to_start_anew(path, load_path, find_last)
    for key in ("find_last_checkpoint=true", "save_checkpoint_path", "move the folder away", "(2)"):
        assert key in str(refusal.value)
