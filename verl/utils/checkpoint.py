# SPDX-License-Identifier: Apache-2.0
"""Names of checkpoints on disk, finding the latest one, and removing old ones.

Layout under the save path: `checkpoint_tracker.json` and `global_step_<N>/{manifest.json, dataloader.pt, actor/...,
critic/...}`, with the world size in the names of each rank's files, and `kl_coef.json` if the coefficient adapts. The
workers define the content of their files. `checkpoint_folder.py` writes and checks one folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl.utils.checkpoint_folder import MANIFEST, find_damage, read_manifest, remove_if_possible
from verl.utils.writing import write_json

CHECKPOINT_TRACKER = "checkpoint_tracker.json"
DATALOADER_FILE = "dataloader.pt"
KL_COEF_FILE = "kl_coef.json"

SCORE_DIGITS = 4
"""Decimal places of the best score in the tracker."""

logger = logging.getLogger(__name__)


def step_folder(root: str, step: int) -> str:
    """The folder that holds everything saved at `step`."""
    return os.path.join(root, f"global_step_{step}")


def step_of(path: str) -> int:
    """The step of a checkpoint folder, from the end of its name.

    Raises:
        ValueError: the last component of `path` does not end in `global_step_<N>`.
    """
    match = re.search(r"global_step_(\d+)$", os.path.basename(os.path.normpath(path)))
    if match is None:
        raise ValueError(
            f"{path!r} is not a checkpoint folder: its name must end in global_step_<N>, e.g. .../global_step_40"
        )
    return int(match.group(1))


def model_file(world_size: int, rank: int) -> str:
    """File name of one rank's share of the weights."""
    return f"model_world_size_{world_size}_rank_{rank}.pt"


def optim_file(world_size: int, rank: int) -> str:
    """File name of one rank's share of the optimizer state."""
    return f"optim_world_size_{world_size}_rank_{rank}.pt"


def extra_state_file(world_size: int, rank: int) -> str:
    """File name of one rank's learning-rate scheduler and random-number states."""
    return f"extra_state_world_size_{world_size}_rank_{rank}.pt"


def is_model_only(folder: str) -> bool:
    """Whether the checkpoint of a step was saved without optimizers, so that it cannot continue training exactly.

    The manifest says so. Without a manifest, as in EasyR1's checkpoints, it is true if there are no optimizer files.
    """
    manifest = read_manifest(folder)
    return not any(Path(folder, "actor").glob("optim_world_size_*")) if manifest is None else manifest.model_only


def write_kl_coef(folder: str, kl_coef: float) -> str:
    """Saves the adaptive KL coefficient for the step after the checkpoint; returns the file's path."""
    path = os.path.join(folder, KL_COEF_FILE)
    write_json(path, {"kl_coef": kl_coef})
    return path


def read_kl_coef(folder: str) -> float | None:
    """The coefficient that `write_kl_coef` saved; None if the run had no adaptive one.

    Raises:
        ValueError: the file is damaged.
    """
    path = os.path.join(folder, KL_COEF_FILE)
    if not os.path.exists(path):
        return None
    try:
        content = _json_in(path)
    except json.JSONDecodeError as error:
        raise damaged_checkpoint(folder, f"{path} is not JSON ({error})") from error
    kl_coef = content.get("kl_coef") if isinstance(content, dict) else None
    if not _is_number(kl_coef) or kl_coef < 0:
        raise damaged_checkpoint(folder, f"{path} has no kl_coef of 0 or more")
    return kl_coef


def damaged_checkpoint(folder: str | os.PathLike[str], problem: str) -> ValueError:
    """The error for a checkpoint that cannot be resumed: the problem, and another checkpoint to resume from.

    Args:
        folder: `.../global_step_<N>`.
        problem: the problem, with the file's path.
    """
    root, name = os.path.split(os.path.abspath(folder))
    step = step_of(name) if re.fullmatch(r"global_step_\d+", name) else math.inf
    earlier = max((other for other in steps_on_disk(root) if other < step), default=None)
    way = (
        "there is no whole checkpoint before it"
        if earlier is None
        else f"trainer.load_checkpoint_path={step_folder(root, earlier)} goes on from the newest whole one before it"
    )
    return ValueError(f"{problem}. {name} cannot be resumed; {way}")


def write_tracker(
    root: str, last_global_step: int, best_global_step: int | None, best_val_reward_score: float | None
) -> None:
    """Records which checkpoint is the latest and which is the best.

    Call it when the checkpoint of `last_global_step` is complete. `best_global_step` and `best_val_reward_score` are
    None before the first validation.
    """
    tracker = {
        "best_global_step": best_global_step,
        "best_val_reward_score": None if best_val_reward_score is None else round(best_val_reward_score, SCORE_DIGITS),
        "last_global_step": last_global_step,
        "last_actor_path": os.path.join(os.path.abspath(step_folder(root, last_global_step)), "actor"),
    }
    write_json(os.path.join(root, CHECKPOINT_TRACKER), tracker)


def find_latest_ckpt(path: str) -> tuple[str | None, dict[str, Any]]:
    """The folder of the last complete checkpoint under `path` and the tracker's contents.

    If the tracker is missing or damaged, or names a folder that does not exist, the most recently saved whole
    checkpoint is used, with one warning. The folder is None if there is no checkpoint.
    """
    tracker, problem = _read_tracker(os.path.join(path, CHECKPOINT_TRACKER))
    if problem is None:
        folder = step_folder(path, tracker["last_global_step"])
        if os.path.isdir(folder):
            return folder, tracker
        problem = f"names {folder}, which does not exist"
    steps = steps_on_disk(path)
    if not steps:
        if not _step_folders(path) and os.path.exists(os.path.join(path, CHECKPOINT_TRACKER)):
            logger.warning(
                "%s in %s %s, and there is no whole checkpoint beside it: nothing to resume from. To start from one "
                "elsewhere, set trainer.load_checkpoint_path",
                CHECKPOINT_TRACKER,
                path,
                problem,
            )
        return None, tracker
    newest = max(steps, key=lambda step: (_saved_at(step_folder(path, step)), step))
    folder = step_folder(path, newest)
    logger.warning(
        "%s in %s %s; the newest whole checkpoint is %s. To start from another one, set trainer.load_checkpoint_path",
        CHECKPOINT_TRACKER,
        path,
        problem,
        folder,
    )
    if tracker.get("best_global_step") not in steps:
        tracker = {**tracker, "best_global_step": None, "best_val_reward_score": None}
    return folder, {**tracker, "last_global_step": newest}


def steps_on_disk(path: str) -> list[int]:
    """The steps of the whole checkpoints under `path`, in order.

    A checkpoint is whole if all files of its manifest are there with the right sizes. Without a manifest, as in
    EasyR1's, it is whole if it has `dataloader.pt`, which is written last.
    """
    matches = (
        (folder, re.fullmatch(r"global_step_(\d+)", folder.name)) for folder in Path(path).glob("global_step_*")
    )
    return sorted(int(match.group(1)) for folder, match in matches if match is not None and _is_whole(folder))


def _is_whole(folder: Path) -> bool:
    has_end = (folder / MANIFEST).exists() or (folder / DATALOADER_FILE).exists()
    return has_end and find_damage(folder) is None


def _saved_at(folder: str) -> str:
    """When the checkpoint was saved. A later step may be older, if a run went back to an earlier step."""
    manifest = read_manifest(folder)
    return "" if manifest is None else manifest.saved_at


def _read_tracker(path: str) -> tuple[dict[str, Any], str | None]:
    """The contents (empty if unreadable), and what is wrong with the file."""
    if not os.path.exists(path):
        return {}, "does not exist"
    try:
        tracker = _json_in(path)
    except json.JSONDecodeError as error:
        return {}, f"is not JSON ({error})"
    if not isinstance(tracker, dict) or type(tracker.get("last_global_step")) is not int:
        return {}, "has no last_global_step"
    score, best_step = tracker.get("best_val_reward_score"), tracker.get("best_global_step")
    if score is not None and not _is_number(score):
        return {}, f"has a best_val_reward_score of {score!r}"
    if best_step is not None and type(best_step) is not int:
        return {}, f"has a best_global_step of {best_step!r}"
    return tracker, None


def _json_in(path: str) -> Any:
    with open(path, encoding="utf-8", errors="replace") as file:
        return json.loads(file.read())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, and the best step and score so far."""

    folder: str
    step: int
    best_step: int | None = None
    best_score: float | None = None

    def is_under(self, root: str) -> bool:
        """Whether it was saved under `root`: a run that saves there continues the same run."""
        return os.path.dirname(os.path.abspath(self.folder)) == os.path.abspath(root)


def find_resume_point(save_path: str, load_path: str | None, find_last: bool) -> ResumePoint | None:
    """The checkpoint to resume from: `load_path`, else with `find_last` the latest under `save_path`; None for none.

    The best step and score come from the tracker file under `save_path`; a `load_path` from another run brings none.

    Raises:
        ValueError: a file of the checkpoint's manifest is missing or has another size; or no checkpoint under
            `save_path` is whole.
    """
    if load_path is None and not find_last:
        return None
    if load_path is None:
        folder, tracker = find_latest_ckpt(save_path)
    else:
        folder, (tracker, _) = load_path, _read_tracker(os.path.join(save_path, CHECKPOINT_TRACKER))
    if folder is None:
        _refuse_steps_without_a_whole_one(save_path)
        return None
    if (damage := find_damage(folder)) is not None:
        raise damaged_checkpoint(folder, damage)
    point = ResumePoint(folder, step_of(folder))
    if point.is_under(save_path):
        best_step, best_score = tracker.get("best_global_step"), tracker.get("best_val_reward_score")
        return replace(point, best_step=best_step, best_score=best_score)
    return point


def refuse_to_start_anew(save_path: str, load_path: str | None, find_last: bool) -> None:
    """Raise if a run would start from scratch in a folder with checkpoints of an earlier run and replace them.

    Raises:
        ValueError: it would; the message names three ways to go on.
    """
    is_resumed = find_last if load_path is None else ResumePoint(load_path, step_of(load_path)).is_under(save_path)
    steps = [step_of(folder.name) for folder in _step_folders(save_path)]
    if steps and not is_resumed:
        listed = ", ".join(map(str, steps[-5:]))
        raise ValueError(
            f"trainer.save_checkpoint_path={save_path} holds steps of an earlier run ({listed}), and this one would "
            "start anew beside them. To go on from the last, set trainer.find_last_checkpoint=true and no "
            "trainer.load_checkpoint_path; to keep both runs, set another trainer.save_checkpoint_path (or, where it "
            "follows from that, trainer.experiment_name); to start over, move the folder away"
        )


def _refuse_steps_without_a_whole_one(save_path: str) -> None:
    """Raise if no checkpoint is whole: a run from scratch would replace files that may be worth repairing."""
    folders = _step_folders(save_path)
    if folders:
        last = folders[-1]
        problem = find_damage(last) or f"{last} has neither {MANIFEST} nor {DATALOADER_FILE}"
        raise ValueError(
            f"trainer.save_checkpoint_path={save_path} holds steps of an earlier run, and none of them is whole: "
            f"{problem}. To go on from one of them, name it with trainer.load_checkpoint_path; to keep them, set "
            "another trainer.save_checkpoint_path; to start over, move the folder away"
        )


def _step_folders(path: str) -> list[Path]:
    """The folders of checkpoints, whole or not, in the order of their steps."""
    folders = [folder for folder in Path(path).glob("global_step_*") if re.fullmatch(r"global_step_\d+", folder.name)]
    return sorted(folders, key=lambda folder: step_of(folder.name))


def remove_obsolete_ckpt(path: str, global_step: int, best_global_step: int | None, save_limit: int) -> None:
    """Deletes old checkpoints so that `save_limit` remain, counting the one of `global_step`.

    Call it when the checkpoint of `global_step` is complete. The best one always stays, even beyond the limit; the
    other places go to the newest earlier ones. Folders of later steps and folders with other names are not touched.

    Args:
        path: the folder that holds the `global_step_<N>` folders.
        global_step: the step just saved.
        best_global_step: the step with the best validation score, None if there is none.
        save_limit: how many to keep; zero or less keeps all.
    """
    if save_limit <= 0:
        return
    matches = [re.fullmatch(r"global_step_(\d+)", name) for name in os.listdir(path)]
    older = sorted(step for match in matches if match is not None and (step := int(match.group(1))) < global_step)
    kept = {global_step} | ({best_global_step} & set(older))
    others = [step for step in older if step not in kept]
    num_removed = max(len(others) - max(save_limit - len(kept), 0), 0)
    for step in others[:num_removed]:
        folder = step_folder(path, step)
        logger.info("removing %s: trainer.save_limit is %d", folder, save_limit)
        remove_if_possible(folder)
