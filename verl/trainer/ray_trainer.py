# SPDX-License-Identifier: Apache-2.0
"""The training loop: one controller that drives the workers, step by step.

Shapes: B prompts, n responses each, N = B * n rows, R response length, W workers. A DataProto batch holds the streams
listed in `verl/trainer/streams.py`; each phase says which streams it reads and adds.
"""

import logging
from collections.abc import Iterator
from typing import Any

import ray
import torch
from transformers import PreTrainedTokenizerBase

from verl.algorithms.importance import truncated_importance_weights
from verl.algorithms.policy_loss import POLICY_LOSSES
from verl.algorithms.token_weights import measured_streams
from verl.data.image_grids import ImageGrids
from verl.data.loader import BatchLoader, PromptLoader
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from verl.single_controller.worker_group import WorkerGroup
from verl.single_controller.worker_processes import WorkerProcesses
from verl.trainer.advantage_phase import compute_advantages
from verl.trainer.balance_phase import balance_across_ranks
from verl.trainer.config import PPOConfig
from verl.trainer.metrics import (
    compute_attention_metrics,
    compute_cancelled_share,
    compute_data_metrics,
    compute_rollout_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    largest_of_workers,
)
from verl.trainer.rewards import RewardClient
from verl.trainer.rollouts import Rollouts
from verl.trainer.run_state import RunState
from verl.trainer.samples import SampleLogger, is_due
from verl.trainer.standstill import Standstill
from verl.trainer.step_record import StepRecord
from verl.trainer.stop_request import StopRequest
from verl.trainer.streams import maps_samples, scores_beside, scores_measured, streams_read_by
from verl.trainer.token_weigher import TokenWeigher
from verl.trainer.tracking import Tracker
from verl.trainer.validator import ValidationResult, Validator
from verl.utils.batch_plan import BatchPlan
from verl.utils.checkpoint import ResumePoint
from verl.workers.reward.results import values_by_key
from verl.workers.rollout.base import Sampling

logger = logging.getLogger(__name__)

FSDP_WORKER = "verl.workers.fsdp_workers:FSDPWorker"


class RayDAPOTrainer:
    """Trains a policy, and a critic where the advantages need one, on a Ray cluster.

    Use: `trainer.init_workers()` then `trainer.fit()`, and `trainer.shutdown()` in any case.

    Args:
        config: the run's configuration.
        plan: the run's batch plan.
        training_steps: number of steps of the run.
        tokenizer: the policy's tokenizer.
        grids: positions of image tokens on their images, for the report; None for a text-only model.
        train_loader: endless source of prompts, with a state that a checkpoint keeps.
        val_loader: the held-out set, in batches.
        rewards: the reward function's process; the caller ends it.
        processes: the processes that host the workers; the caller ends them.
        tracker: where metrics go.
        resume_point: the checkpoint to resume from; None starts from the model's own weights.
        stop_request: true once the run has been asked to finish the current step, save it and end.
    """

    def __init__(
        self,
        config: PPOConfig,
        plan: BatchPlan,
        training_steps: int,
        tokenizer: PreTrainedTokenizerBase,
        grids: ImageGrids | None,
        train_loader: PromptLoader,
        val_loader: BatchLoader,
        rewards: RewardClient,
        processes: WorkerProcesses,
        tracker: Tracker,
        resume_point: ResumePoint | None,
        stop_request: StopRequest,
    ) -> None:
        self.config = config
        self.plan = plan
        self.training_steps = training_steps
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.rewards = rewards
        self.processes = processes
        self.tracker = tracker
        self.resume_point = resume_point
        self.stop_request = stop_request
        self.state = RunState(config)
        self.tracker.add_files(self.state.files)
        self.weigher = TokenWeigher(config, tokenizer)
        self.samples = SampleLogger(config, training_steps, tokenizer, grids, self.weigher, tracker)
        self.workers: WorkerGroup | None = None
        self.rollouts: Rollouts | None = None
        self.validator: Validator | None = None
        self.standstill: Standstill | None = None

    # ---- life ----

    def init_workers(self) -> None:
        """Loads the policy into one worker per device."""
        self.tracker.phase("load", "loading the model")
        self.workers = WorkerGroup(
            self.processes,
            FSDP_WORKER,
            shares=self.plan.shares,
            config=self.config,
            plan=self.plan,
            policy_loss=POLICY_LOSSES.find(self.config.worker.actor.loss_type),
            signal_streams=measured_streams(self.config.algorithm, self.config.worker.rollout.collect_attentions),
            training_steps=self.training_steps,
            with_videos=self.train_loader.dataset.has_videos or self.val_loader.dataset.has_videos,
        )
        self.workers.init_model()
        self.rollouts = Rollouts(self.config, self.plan, self.workers, self.train_loader, self.rewards)
        self.standstill = Standstill(self.config.trainer, self.plan, self.workers)
        self.tracker.add_files(self.standstill.files)
        self.validator = Validator(
            self.val_loader,
            self.rollouts.for_validation,
            lambda batch: self.rewards.validate(batch, self.state.global_step),
            self.config.trainer.val_generations_to_log,
            lambda num_done: self.tracker.validated(num_done, self.val_loader.num_prompts),
        )

    def shutdown(self) -> None:
        """Frees the workers."""
        if self.workers is not None:
            self.workers.release()

    # ---- the loop ----

    def fit(self) -> None:
        """Trains to the end of the run, from the checkpoint or from step 0."""
        self._resume()
        self._validate_before_training()
        for step in self._remaining_steps():
            record = StepRecord(step, on_phase=self.tracker.phase)
            with record.timed("step"):
                batch = self._rollout(record)
                batch = self._balance_across_ranks(batch, record)
                rewards = self._start_rewards(batch)
                self._choose_samples(batch, record)
                batch = self._compute_log_probs(batch, record)
                batch = self._compare_with_rollout(batch, record)
                batch = self._compute_values(batch, record)
                batch = self._await_rewards(batch, rewards, record)
                batch = self._attach_token_weights(batch, record)
                batch = self._compute_advantages(batch, record)
                self._update_critic(batch, record)
                self._update_actor(batch, record)
                self._watch_progress(batch, record)
                self._log_samples(batch, record)
                self._validate_if_due(record)
                self._save_if_due(record)
            self._log(batch, record)
            self._name_checkpoint()
        self._finish()

    def _remaining_steps(self) -> Iterator[int]:
        if self.config.trainer.val_only:
            return
        self.stop_request.let_steps_finish()
        while self.state.global_step < self.training_steps and not self.stop_request:
            self.state.global_step += 1
            yield self.state.global_step

    def _rollout(self, record: StepRecord) -> DataProto:
        """Responses to the step's prompts, from `Rollouts.draw`. Scoring that happens here (to filter groups, or for
        baselines) counts as part of the phase `gen`, as in EasyR1.

        Adds: what `Rollouts.draw` adds; `reward_baselines`, if the estimator needs them.
        """
        with record.timed("gen"), self.rollouts.awake():
            batch = self.rollouts.draw(record)
            if self.config.algorithm.needs_baselines:
                self.rollouts.add_baselines(batch, record)
        return batch

    def _balance_across_ranks(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: what `balance_across_ranks` reads."""
        record.add(balance_across_ranks(batch, self.config, self.plan))
        return batch

    def _start_rewards(self, batch: DataProto) -> ray.ObjectRef | None:
        """Sends the responses to the reward actor, which scores them while the workers compute. None if they are
        already scored, or if the function needs streams of the log-prob pass.

        Reads: what `reward_inputs` reads.
        """
        return self.rewards.send(batch, self.state.global_step) if scores_beside(self.config) else None

    def _choose_samples(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: `uid`. Adds: `is_mapped`, the rows whose tokens the report will show, in runs that make one."""
        if maps_samples(self.config):
            batch.batch["is_mapped"] = self.samples.chosen(batch, record.step)

    def _compute_log_probs(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: the model's inputs, `is_mapped` in runs that have it. Adds: `old_log_probs`; the streams of the run's
        token signals; `attention_mass` and `attention_keys` if attention is collected; `attention_maps` for the
        report; with a KL term `ref_log_probs`, or, with the full KL in the reward, `ref_kl`."""
        algorithm = self.config.algorithm
        sequences = self._streams_for("compute_log_probs", batch)
        with record.timed("old"):
            batch = batch.union(self.workers.compute_log_probs(sequences))
        if self.config.worker.rollout.collect_attentions:
            record.add(compute_attention_metrics(batch))
        if algorithm.full_kl_in_reward:
            with record.timed("ref"):
                batch = batch.union(self.workers.compute_ref_kl(sequences))
        if algorithm.estimates_kl:
            with record.timed("ref"):
                batch = batch.union(self.workers.compute_ref_log_probs(sequences))
        return batch

    def _compare_with_rollout(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: `old_log_probs`, `rollout_log_probs`, `response_mask`. Adds: `importance_weights` if asked for."""
        streams, cap = batch.batch, self.config.worker.rollout.importance_cap
        if cap is not None:
            streams["importance_weights"] = truncated_importance_weights(
                streams["old_log_probs"], streams["rollout_log_probs"], streams["response_mask"], cap
            )
        record.add(compute_rollout_metrics(batch, cap))
        return batch

    def _compute_values(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: the model's inputs. Adds: `values`, where there is a critic."""
        if self.plan.critic is None:
            return batch
        with record.timed("values"):
            return batch.union(self.workers.compute_values(self._streams_for("compute_values", batch)))

    def _await_rewards(self, batch: DataProto, rewards: ray.ObjectRef | None, record: StepRecord) -> DataProto:
        """Reads: `response_mask`; if scoring starts only here, what `reward_inputs` reads. Adds: what
        `RewardClient.receive` adds, unless the batch has it already."""
        if scores_measured(self.config):
            rewards = self.rewards.send(batch, self.state.global_step)
        return batch if rewards is None else self.rewards.receive(batch, rewards, record)

    def _attach_token_weights(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: `response_mask`, the streams of the run's token signals; in weighted runs `responses` and
        `reward_results`. Adds: `token_weights`, if they are enabled; all 1 if neither source gives weights."""
        streams = batch.batch
        if self.config.algorithm.enable_token_weights:
            reward_values = values_by_key(batch.non_tensor_batch["reward_results"])
            token_weights = self._maybe_compute_token_weights(batch, reward_values)
            streams["token_weights"] = streams["response_mask"].float() if token_weights is None else token_weights
        record.add(self.weigher.metrics(batch))
        return batch

    def _maybe_compute_token_weights(
        self, batch: DataProto, reward_metrics: dict[str, list[Any]]
    ) -> torch.Tensor | None:
        """Weights (N, R) float32 for the actor's loss, zero outside the responses; None if no source gives any.

        Weights that the reward function returned under `token_weights` have priority. Other samples take the weights
        of the run's token signal, or 1 where the signal is undefined.

        Args:
            reward_metrics: values per sample of every key that the reward function returned.

        Raises:
            ValueError: the reward function's weights are not finite, negative, or more than the response's tokens; a
                signal returned another shape or an importance below 0.
        """
        if not self.config.algorithm.enable_token_weights:
            return None
        return self.weigher.weights(batch, reward_metrics, self.state.global_step)

    def _compute_advantages(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads, adds: what `compute_advantages` does."""
        with record.timed("adv"):
            may_adapt = self._actor_learns(record.step)
            record.add(compute_advantages(batch, self.config.algorithm, self.state, may_adapt))
        return batch

    def _update_critic(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: the model's inputs, `values`, `returns`."""
        if self.plan.critic is None:
            return
        with record.timed("update_critic"):
            record.add(self.workers.update_critic(self._streams_for("update_critic", batch)))

    def _actor_learns(self, step: int) -> bool:
        return step >= self.config.trainer.critic_warmup

    def _update_actor(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: the model's inputs, `old_log_probs`, `advantages`; `ref_log_probs`, `token_weights` and
        `importance_weights` in runs that have them."""
        if not self._actor_learns(record.step):
            return
        with record.timed("update_actor"):
            record.add(self.workers.update_actor(self._streams_for("update_actor", batch)))

    def _watch_progress(self, batch: DataProto, record: StepRecord) -> None:
        """Ends a run that makes no progress, before the step is saved.

        Reads: `response_mask`, `advantages`, `uid`, `prompt_text`."""
        self.standstill.watch(batch, record)

    def _log_samples(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: what `SampleLogger.log_training` reads."""
        self.samples.log_training(batch, record.step)

    def _validate_if_due(self, record: StepRecord) -> None:
        """Skipped if the run was asked to end: the remaining time is for saving."""
        if is_due(record.step, self.config.trainer.val_freq) and not self.stop_request:
            with record.timed("validation"):
                record.add(self._validate().metrics)

    def _save_if_due(self, record: StepRecord) -> None:
        if is_due(record.step, self.config.trainer.save_freq) or self.stop_request:
            with record.timed("save_checkpoint"):
                self.state.save(self.workers, self.train_loader)

    def _name_checkpoint(self) -> None:
        """Called after logging, so that a run that resumes from the checkpoint finds the step in the log."""
        self.state.publish(self.workers, wait=not self.config.trainer.save_async)

    def _log(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: `attention_mask`, `response_mask`, `token_level_scores`, `token_level_rewards`, `advantages`,
        `returns`, `values` where there is a critic; in weighted runs `responses`, `uid`, `token_weights`."""
        record.add(compute_data_metrics(batch, has_critic=self.plan.critic is not None))
        if self.config.algorithm.enable_token_weights:
            record.add({"token_weights/cancelled_share": compute_cancelled_share(batch)})
        record.add(compute_timing_metrics(batch, record.timings))
        record.add(compute_throughput_metrics(batch, record.timings, self.plan.world_size))
        record.add(largest_of_workers(self.workers.memory_metrics()))
        self.tracker.log(record.metrics, record.step)

    def _resume(self) -> None:
        """Restores the checkpoint, if there is one."""
        point = self.resume_point
        if point is None:
            return
        self.state.resume(point, self.workers, self.train_loader)
        self.tracker.note(f"resumed from {point.folder} at step {point.step} of {self.training_steps}")
        if point.step >= self.training_steps:
            logger.warning(
                "%s has reached the run's last step, %d: raise trainer.max_steps or trainer.total_epochs to go on",
                point.folder,
                self.training_steps,
            )

    def _validate_before_training(self) -> None:
        if self.config.trainer.val_before_train:
            self.tracker.log(self._validate().metrics, self.state.global_step)

    def _finish(self) -> None:
        """Saves and validates the last step, whatever the frequencies. A run that was asked to end is only saved.

        The checkpoint comes first, so that a validation that fails loses no training.
        """
        if self.config.trainer.val_only:
            return
        self.tracker.phase("save_checkpoint")
        if not self.state.is_saved:
            self.state.save(self.workers, self.train_loader)
        self.state.publish(self.workers)
        if not self.state.is_validated and not self.stop_request:
            self.tracker.log(self._validate().metrics, self.state.global_step)
        self.state.track_checkpoint()
        if self.stop_request:
            step, last = self.state.global_step, self.training_steps
            self.tracker.note(f"ended as asked, saved at step {step} of {last}; started again, the run goes on")

    def _streams_for(self, phase: str, batch: DataProto) -> DataProto:
        """The streams that a phase reads, to be sent to the workers."""
        return batch.select(*streams_read_by(phase, self.config), [])

    # ---- validation ----

    def _validate(self) -> ValidationResult:
        self.tracker.phase("validation", f"validating {self.val_loader.num_prompts} prompts")
        with self.rollouts.awake():
            result = self.validator.run()
        self.state.remember_validation(result.score)
        self.tracker.log_val_rewards(result.rewards, self.state.global_step)
        self.samples.log_validation(result, self._measure_samples(result), self.state.global_step)
        return result

    def _measure_samples(self, result: ValidationResult) -> DataProto | None:
        """The samples of a validation with their media and the streams of the log-prob pass; None if no token maps
        are to be shown."""
        if not (maps_samples(self.config) and result.places):
            return None
        per_prompt = Sampling.for_validation(self.config.worker.rollout).n
        features = self.val_loader.prompts_at([place // per_prompt for place in result.places])
        rows = self.rollouts.with_media(result.rows, features)
        rows.batch["is_mapped"] = torch.ones(len(rows), dtype=torch.bool)
        padded, pad_size = pad_dataproto_to_divisor(self._streams_for("compute_log_probs", rows), self.plan.world_size)
        return rows.union(unpad_dataproto(self.workers.compute_log_probs(padded), pad_size))
