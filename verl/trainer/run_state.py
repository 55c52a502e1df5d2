# SPDX-License-Identifier: Apache-2.0
"""The state of a run: step, KL coefficient, best score. It is saved with the weights and restored on resume."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from verl.data.loader import PromptLoader
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config import PPOConfig
from verl.trainer.sinks import WrittenFile
from verl.utils.checkpoint import (
    CHECKPOINT_TRACKER,
    DATALOADER_FILE,
    KL_COEF_FILE,
    SCORE_DIGITS,
    ResumePoint,
    damaged_checkpoint,
    is_model_only,
    read_kl_coef,
    remove_obsolete_ckpt,
    step_folder,
    steps_on_disk,
    write_kl_coef,
    write_tracker,
)
from verl.utils.checkpoint_folder import (
    UNFINISHED,
    FileRecord,
    publish,
    read_manifest,
    record_files,
    unfinished_folder,
    write_manifest,
)
from verl.utils.safe_load import load_tensors
from verl.utils.writing import naming_write_errors, require_room

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Save:
    """A checkpoint that is being written."""

    folder: str
    step: int
    score: float | None
    """Validation score of the saved weights; None if they were not validated."""
    files: dict[str, FileRecord]
    """Files that the trainer wrote; each worker knows its own."""


class RunState:
    """The trainer's state from step to step, apart from the workers' weights and the loader's position.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.global_step = 0
        self.kl_coef = config.algorithm.kl_coef
        self.best_step: int | None = None
        self.best_score: float | None = None
        self.last_validation: tuple[int, float] | None = None
        self.last_saved_step: int | None = None
        self._save: Save | None = None

    @property
    def is_validated(self) -> bool:
        """Whether the policy of the current step has been validated."""
        return self.last_validation is not None and self.last_validation[0] == self.global_step

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of the current step is in the run's folder or being written."""
        return self.global_step in (self.last_saved_step, self._save.step if self._save is not None else None)

    def remember_validation(self, score: float) -> None:
        """Records the validation score of the current policy."""
        self.last_validation = (self.global_step, score)

    def save(self, workers: WorkerGroup, loader: PromptLoader) -> None:
        """Writes a checkpoint of this step; with `trainer.save_async`, starts to. It is valid once `publish` names it.

        Raises:
            RuntimeError: the disk is too full, or a file could not be written.
        """
        trainer = self.config.trainer
        self.publish(workers)  # one is written at a time
        folder = step_folder(trainer.save_checkpoint_path, self.global_step)
        require_room(folder, sum(workers.checkpoint_bytes(trainer.save_model_only)))
        unfinished = unfinished_folder(folder)
        workers.save_checkpoint(unfinished, trainer.save_model_only, in_background=trainer.save_async)
        self._save = Save(folder, self.global_step, self._score, self._write_own(unfinished, loader))

    def _write_own(self, folder: str, loader: PromptLoader) -> dict[str, FileRecord]:
        paths = [os.path.join(folder, DATALOADER_FILE)]
        with naming_write_errors(paths[0]):
            torch.save(loader.state_dict(), paths[0])
        if self.config.algorithm.kl_coef_adapts:
            paths.append(write_kl_coef(folder, self.kl_coef))
        return record_files(folder, *paths)

    @property
    def _score(self) -> float | None:
        """Validation score of the current policy; None if it was not validated."""
        return self.last_validation[1] if self.is_validated else None

    def publish(self, workers: WorkerGroup, wait: bool = True) -> None:
        """Gives a finished checkpoint its final name, if there is one, and makes it the latest.

        Log the step first: a run that resumes from the checkpoint then finds the step in the log.

        Args:
            wait: whether to wait for workers that are still writing.
        """
        save = self._save
        if save is None:
            return
        files = workers.saved_files(wait)
        if None in files:
            return
        self._save = None
        whole = {name: record for rank_files in (*files, save.files) for name, record in rank_files.items()}
        write_manifest(f"{save.folder}{UNFINISHED}", save.step, self.config.trainer.save_model_only, whole)
        publish(save.folder)
        if save.step == self.best_step:  # a run that went back replaces the checkpoint that was the best
            self.best_step = self.best_score = None
        self.last_saved_step = save.step
        self._track(save.step, save.score)

    def track_checkpoint(self) -> None:
        """Adds to the tracker the score of a validation that came after this step's checkpoint."""
        self._track(self.global_step, self._score)

    def _track(self, step: int, score: float | None) -> None:
        """Records the checkpoint of `step` as the latest, and perhaps the best; removes obsolete ones.

        Only a validation of exactly the saved weights can make a checkpoint the best.
        """
        trainer = self.config.trainer
        score = None if score is None else round(score, SCORE_DIGITS)  # as a run that resumes reads it
        if score is not None and (self.best_score is None or score > self.best_score):
            self.best_step, self.best_score = step, score
        root = trainer.save_checkpoint_path
        write_tracker(root, step, self.best_step, self.best_score)
        remove_obsolete_ckpt(root, step, self.best_step, trainer.save_limit)

    def files(self) -> list[WrittenFile]:
        """The tracker and the checkpoints on disk; the last and the best are named by their steps."""
        if self.config.trainer.val_only:
            return []
        root = self.config.trainer.save_checkpoint_path
        steps = steps_on_disk(root)
        named = {
            step: kind for step, kind in ((self.best_step, "best"), (self.last_saved_step, "last")) if step in steps
        }
        files = [WrittenFile(f"{kind} checkpoint", Path(step_folder(root, step))) for step, kind in named.items()]
        if others := len(steps) - len(named):
            files.append(WrittenFile(f"{others} other checkpoint{'s' if others > 1 else ''}", Path(root)))
        return [*files, WrittenFile("checkpoint tracker", Path(root, CHECKPOINT_TRACKER))]

    def resume(self, point: ResumePoint, workers: WorkerGroup, loader: PromptLoader) -> None:
        """Restores model, optimizer, data loader and this state from the checkpoint.

        Raises:
            ValueError: a file of the checkpoint is damaged, or does not fit this run.
        """
        model_only = is_model_only(point.folder)
        if model_only:
            logger.warning("%s has the model only: optimizer and learning-rate schedule start afresh", point.folder)
        workers.load_checkpoint(point.folder, model_only)
        loader_file = os.path.join(point.folder, DATALOADER_FILE)
        if os.path.exists(loader_file):
            self._resume_loader(point.folder, loader_file, loader)
        else:
            logger.warning("%s does not exist: the data starts from its first epoch", loader_file)
        if self.config.algorithm.kl_coef_adapts:
            self._resume_kl_coef(point.folder)
        self.global_step = point.step
        if point.is_under(self.config.trainer.save_checkpoint_path):
            self.last_saved_step = point.step
        self.best_step, self.best_score = point.best_step, point.best_score

    def _resume_loader(self, folder: str, path: str, loader: PromptLoader) -> None:
        try:
            state = load_tensors(path)
        except ValueError as error:
            raise damaged_checkpoint(folder, str(error)) from error
        is_ours = isinstance(state, dict) and "position" in state
        if not is_ours and read_manifest(folder) is None:  # for example EasyR1, which has another data loader
            logger.warning("%s was written by another program: the data starts from its first epoch", path)
            return
        try:
            loader.load_state_dict(state)
        except ValueError as error:
            raise damaged_checkpoint(folder, f"{path}: {error}") from error

    def _resume_kl_coef(self, folder: str) -> None:
        kl_coef = read_kl_coef(folder)
        if kl_coef is not None:
            self.kl_coef = kl_coef
        else:
            path = os.path.join(folder, KL_COEF_FILE)
            logger.warning("%s does not exist: the KL coefficient starts from algorithm.kl_coef", path)
