# SPDX-License-Identifier: Apache-2.0
"""Where a run stands: its step, its KL coefficient, its best score; saved with the weights and taken up again."""

import logging
import os

import torch

from verl.data.loader import PromptLoader
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config import PPOConfig
from verl.trainer.validator import ValidationResult
from verl.utils.checkpoint import (
    DATALOADER_FILE,
    KL_COEF_FILE,
    ResumePoint,
    has_optimizer,
    publish,
    read_kl_coef,
    remove_obsolete_ckpt,
    step_folder,
    unfinished_folder,
    write_kl_coef,
    write_tracker,
)

logger = logging.getLogger(__name__)


class RunState:
    """What the trainer remembers from step to step, beside the workers' weights and the loader's position.

    Args:
        config: of the run.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.global_step = 0
        self.kl_coef = config.algorithm.kl_coef
        self.best_step: int | None = None
        self.best_score: float | None = None
        self.last_validation: tuple[int, ValidationResult] | None = None
        self.last_saved_step: int | None = None
        self.unpublished: str | None = None

    @property
    def is_validated(self) -> bool:
        """Whether the policy of this very step has been validated."""
        return self.last_validation is not None and self.last_validation[0] == self.global_step

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of this very step lies in the run's folder."""
        return self.last_saved_step == self.global_step

    def remember_validation(self, result: ValidationResult) -> None:
        """Takes in the result of a validation of the present policy."""
        self.last_validation = (self.global_step, result)

    def save(self, workers: WorkerGroup, loader: PromptLoader) -> None:
        """Writes a checkpoint of this step, which counts from `publish` on."""
        trainer = self.config.trainer
        folder = step_folder(trainer.save_checkpoint_path, self.global_step)
        unfinished = unfinished_folder(folder)
        workers.save_checkpoint(unfinished, trainer.save_model_only)
        if self.config.algorithm.kl_coef_adapts:
            write_kl_coef(unfinished, self.kl_coef)
        torch.save(loader.state_dict(), os.path.join(unfinished, DATALOADER_FILE))
        self.unpublished = folder

    def publish(self) -> None:
        """Gives the checkpoint of this step its name, if one was written, and makes it the latest.

        A run that is resumed from it finds the step in its log, provided that the step was logged before.
        """
        if self.unpublished is not None:
            publish(self.unpublished)
            self.unpublished = None
            self.last_saved_step = self.global_step
            self.track_checkpoint()

    def track_checkpoint(self) -> None:
        """Writes down that this step's checkpoint is the latest, and perhaps the best; removes what is obsolete.

        Only a score of the saved weights themselves can make a checkpoint the best.
        """
        trainer = self.config.trainer
        if self.is_validated:
            score = self.last_validation[1].score
            if self.best_score is None or score > self.best_score:
                self.best_step, self.best_score = self.global_step, score
        root = trainer.save_checkpoint_path
        write_tracker(root, self.global_step, self.best_step, self.best_score)
        remove_obsolete_ckpt(root, self.global_step, self.best_step, trainer.save_limit)

    def resume(self, point: ResumePoint, workers: WorkerGroup, loader: PromptLoader) -> None:
        """Takes up model, optimizer, data and this state where the checkpoint left them."""
        model_only = not has_optimizer(point.folder)
        if model_only:
            logger.warning("%s has the model only: optimizer and learning-rate schedule start afresh", point.folder)
        workers.load_checkpoint(point.folder, model_only)
        loader_file = os.path.join(point.folder, DATALOADER_FILE)
        if os.path.exists(loader_file):
            loader.load_state_dict(torch.load(loader_file))
        else:
            logger.warning("%s does not exist: the data starts from its first epoch", loader_file)
        if self.config.algorithm.kl_coef_adapts:
            self._resume_kl_coef(point.folder)
        self.global_step = point.step
        if point.is_under(self.config.trainer.save_checkpoint_path):
            self.last_saved_step = point.step
        self.best_step, self.best_score = point.best_step, point.best_score

    def _resume_kl_coef(self, folder: str) -> None:
        kl_coef = read_kl_coef(folder)
        if kl_coef is not None:
            self.kl_coef = kl_coef
        else:
            path = os.path.join(folder, KL_COEF_FILE)
            logger.warning("%s does not exist: the KL coefficient starts from algorithm.kl_coef", path)
