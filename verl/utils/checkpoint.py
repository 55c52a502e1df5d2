# SPDX-License-Identifier: Apache-2.0
"""Names of checkpoints on disk, which of them is the latest, and which may go.

Layout under the save path: `checkpoint_tracker.json` and `global_step_<N>/{dataloader.pt, actor/..., critic/...}`,
each rank's files carrying the world size in their names, and `kl_coef.json` where the coefficient adapts. What is
inside the workers' files is their business.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CHECKPOINT_TRACKER = "checkpoint_tracker.json"
DATALOADER_FILE = "dataloader.pt"
KL_COEF_FILE = "kl_coef.json"

logger = logging.getLogger(__name__)


def step_folder(root: str, step: int) -> str:
    """The folder that holds everything saved at `step`."""
    return os.path.join(root, f"global_step_{step}")


def step_of(path: str) -> int:
    """The step that a checkpoint folder was saved at, from the end of its name.

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


def has_optimizer(folder: str) -> bool:
    """Whether the checkpoint of a step can continue training exactly, or holds the models only."""
    return any(Path(folder, "actor").glob("optim_world_size_*"))


def write_kl_coef(folder: str, kl_coef: float) -> None:
    """Keeps the adaptive KL coefficient that the step after the one of `folder` begins with."""
    write_json(os.path.join(folder, KL_COEF_FILE), {"kl_coef": kl_coef})


def read_kl_coef(folder: str) -> float | None:
    """What `write_kl_coef` kept, exactly; None where the run of `folder` had no adaptive coefficient."""
    path = os.path.join(folder, KL_COEF_FILE)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)["kl_coef"]


def write_tracker(
    root: str, last_global_step: int, best_global_step: int | None, best_val_reward_score: float | None
) -> None:
    """Records which checkpoint is the latest and which is the best.

    Call it when the checkpoint of `last_global_step` is complete. `best_global_step` and `best_val_reward_score` are
    None while there has been no validation.
    """
    tracker = {
        "best_global_step": best_global_step,
        "best_val_reward_score": None if best_val_reward_score is None else round(best_val_reward_score, 4),
        "last_global_step": last_global_step,
        "last_actor_path": os.path.join(os.path.abspath(step_folder(root, last_global_step)), "actor"),
    }
    write_json(os.path.join(root, CHECKPOINT_TRACKER), tracker)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half of one."""
    unfinished = f"{os.fspath(path)}.tmp"
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    os.replace(unfinished, path)


def find_latest_ckpt(path: str) -> tuple[str | None, dict[str, Any]]:
    """The folder of the last complete checkpoint under `path` and the tracker's contents.

    The folder is None where no tracker was written, and where the folder that it names is gone; the latter is
    logged as a warning, since the run would begin from scratch beside its own earlier results.
    """
    tracker_path = os.path.join(path, CHECKPOINT_TRACKER)
    if not os.path.exists(tracker_path):
        return None, {}
    with open(tracker_path, encoding="utf-8") as file:
        tracker = json.load(file)
    folder = step_folder(path, tracker["last_global_step"])
    if not os.path.isdir(folder):
        logger.warning(
            "%s names %s as the latest checkpoint, but there is no such folder; nothing to resume from. "
            "To resume from another one, set trainer.load_checkpoint_path.",
            tracker_path,
            folder,
        )
        return None, tracker
    return folder, tracker


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from, and what is known of the best one before it."""

    folder: str
    step: int
    best_step: int | None = None
    best_score: float | None = None

    def is_under(self, root: str) -> bool:
        """Whether it was saved under `root`: a run that saves there too is the same run, resumed."""
        return os.path.dirname(os.path.abspath(self.folder)) == os.path.abspath(root)


def find_resume_point(save_path: str, load_path: str | None, find_last: bool) -> ResumePoint | None:
    """Where a run begins: `load_path` if given, else the latest checkpoint under `save_path` if `find_last` (or None).

    The best step and score come from the tracker file under `save_path`; a `load_path` from another run brings none.
    """
    latest, tracker = find_latest_ckpt(save_path)
    folder = load_path if load_path is not None else (latest if find_last else None)
    if folder is None:
        return None
    point = ResumePoint(folder, step_of(folder))
    if point.is_under(save_path):
        best_step, best_score = tracker.get("best_global_step"), tracker.get("best_val_reward_score")
        return replace(point, best_step=best_step, best_score=best_score)
    return point


def remove_obsolete_ckpt(path: str, global_step: int, best_global_step: int | None, save_limit: int) -> None:
    """Deletes old checkpoints so that `save_limit` remain, counting the one of `global_step`.

    Call it when the checkpoint of `global_step` is complete. The best one always stays, even beyond the limit; the
    other places go to the newest older ones. Folders of later steps and folders with other names are not touched.

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
        shutil.rmtree(folder)
