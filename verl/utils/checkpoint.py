# SPDX-License-Identifier: Apache-2.0
"""Names of checkpoints on disk, which of them is the latest, and which may go.

Layout under the save path: `checkpoint_tracker.json` and `global_step_<N>/{dataloader.pt, actor/..., critic/...}`,
each rank's files carrying the world size in their names, and `kl_coef.json` where the coefficient adapts. What is
inside the workers' files is their business. A checkpoint is written as `global_step_<N>.unfinished` and gets its name
when it is whole; one that it replaces is `global_step_<N>.replaced` for the moment between.
"""

from __future__ import annotations

import errno
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
UNFINISHED = ".unfinished"
REPLACED = ".replaced"

logger = logging.getLogger(__name__)


def step_folder(root: str, step: int) -> str:
    """The folder that holds everything saved at `step`."""
    return os.path.join(root, f"global_step_{step}")


def unfinished_folder(folder: str) -> str:
    """Where the checkpoint of `folder` is written until it is whole. What an earlier attempt left there is removed."""
    unfinished = f"{folder}{UNFINISHED}"
    _remove(unfinished)
    return unfinished


def publish(folder: str) -> None:
    """Gives the checkpoint that was written to `unfinished_folder(folder)` its name, once its files are on disk.

    A checkpoint of that name is replaced. Whatever happens on the way, `settle_checkpoints` finds one of the two.
    """
    unfinished, replaced = f"{folder}{UNFINISHED}", f"{folder}{REPLACED}"
    flush_all(unfinished)
    _remove(replaced)
    if os.path.isdir(folder):
        os.rename(folder, replaced)
    os.rename(unfinished, folder)
    flush(os.path.dirname(folder))
    _remove(replaced)


def settle_checkpoints(root: str) -> None:
    """Puts right what a run that was killed while it saved has left under `root`.

    A checkpoint that was about to be replaced gets its name back; what is unfinished or was replaced is removed.
    """
    for path in sorted(Path(root).glob("global_step_*")):
        folder = path.with_suffix("")
        if path.suffix == REPLACED and not folder.exists():
            logger.warning("%s was being replaced when its run ended: it is %s again", path, folder)
            path.rename(folder)
        elif path.suffix in (UNFINISHED, REPLACED):
            _remove(path)


def _remove(path: str | os.PathLike[str]) -> None:
    """A folder with all in it, or the link to one; nothing where there is nothing."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.exists(path):
        shutil.rmtree(path)


def flush_all(folder: str | os.PathLike[str]) -> None:
    """`flush` for a folder and all in it."""
    for path in (Path(folder), *Path(folder).rglob("*")):
        flush(path)


def flush(path: str | os.PathLike[str]) -> None:
    """Has the storage keep what this machine wrote to a file or a folder, whatever happens next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such call for folders
            raise
    finally:
        os.close(descriptor)


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

    Where the tracker is missing or damaged, or names a folder that is gone, the newest checkpoint counts that has its
    `dataloader.pt`, which is written last; one warning says so. The folder is None where there is no checkpoint.
    """
    tracker, problem = _read_tracker(os.path.join(path, CHECKPOINT_TRACKER))
    if problem is None:
        folder = step_folder(path, tracker["last_global_step"])
        if os.path.isdir(folder):
            return folder, tracker
        problem = f"names {folder}, which does not exist"
    newest = max(steps_on_disk(path), default=None)
    if newest is None:
        if tracker or os.path.exists(os.path.join(path, CHECKPOINT_TRACKER)):
            logger.warning(
                "%s in %s %s, and there is no whole checkpoint beside it: nothing to resume from. To start from one "
                "elsewhere, set trainer.load_checkpoint_path",
                CHECKPOINT_TRACKER,
                path,
                problem,
            )
        return None, tracker
    folder = step_folder(path, newest)
    logger.warning(
        "%s in %s %s; the newest whole checkpoint is %s. To start from another one, set trainer.load_checkpoint_path",
        CHECKPOINT_TRACKER,
        path,
        problem,
        folder,
    )
    best_step = tracker.get("best_global_step")
    if best_step not in steps_on_disk(path):
        tracker = {**tracker, "best_global_step": None, "best_val_reward_score": None}
    return folder, {**tracker, "last_global_step": newest}


def steps_on_disk(path: str) -> list[int]:
    """The steps of the whole checkpoints under `path`, in order."""
    files = Path(path).glob(f"global_step_*/{DATALOADER_FILE}")
    matches = [re.fullmatch(r"global_step_(\d+)", file.parent.name) for file in files]
    return sorted(int(match.group(1)) for match in matches if match is not None)


def _read_tracker(path: str) -> tuple[dict[str, Any], str | None]:
    """The contents, and what is wrong with the file; empty where it cannot be read."""
    if not os.path.exists(path):
        return {}, "does not exist"
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        tracker = json.loads(text)
    except json.JSONDecodeError as error:
        return {}, f"is not JSON ({error})"
    if not isinstance(tracker, dict) or not isinstance(tracker.get("last_global_step"), int):
        return {}, "has no last_global_step"
    score = tracker.get("best_val_reward_score")
    if score is not None and not isinstance(score, (int, float)):
        return {}, f"has a best_val_reward_score of {score!r}"
    return tracker, None


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
    if load_path is None and not find_last:
        return None
    if load_path is None:
        folder, tracker = find_latest_ckpt(save_path)
    else:
        folder, (tracker, _) = load_path, _read_tracker(os.path.join(save_path, CHECKPOINT_TRACKER))
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
