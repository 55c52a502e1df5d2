# SPDX-License-Identifier: Apache-2.0
"""The training loop: one controller that drives the workers, step by step.

Shapes: B prompts, n responses each, N = B * n rows, R response length, W workers. DataProto batches hold the streams;
each phase says which it reads and which it adds.
"""

import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch
from transformers import PreTrainedTokenizerBase

from verl.algorithms.advantages import ADVANTAGE_ESTIMATORS
from verl.algorithms.kl import apply_kl_penalty, compute_kl
from verl.data.loader import PromptLoader
from verl.data.vision import MediaHandle
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config import PPOConfig
from verl.trainer.metrics import (
    compute_attention_metrics,
    compute_data_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    compute_token_weight_metrics,
    reduce_metrics,
)
from verl.trainer.validator import ValidationResult, Validator
from verl.utils.attention_token_weights import choose_token_weights
from verl.utils.batch_plan import BatchPlan
from verl.utils.checkpoint import (
    DATALOADER_FILE,
    ResumePoint,
    remove_obsolete_ckpt,
    step_folder,
    write_tracker,
)
from verl.utils.seqlen_balancing import balanced_order, seqlen_metrics
from verl.utils.step_record import StepRecord
from verl.utils.tracking import Tracker
from verl.workers.fsdp_checkpoint import has_optimizer
from verl.workers.fsdp_workers import FSDPWorker
from verl.workers.reward.function import TOKEN_WEIGHTS, AutoRewardManager
from verl.workers.rollout.base import Sampling

logger = logging.getLogger(__name__)

TRAIN, VAL = 0, 1
"""First part of every rollout seed, so that validation never repeats training's draws."""


class RayDAPOTrainer:
    """Trains a policy with GRPO-family algorithms on a Ray cluster.

    Use: `trainer.init_workers()` then `trainer.fit()`, and `trainer.shutdown()` in any case.

    Args:
        config: of the run.
        plan: its batch numbers.
        training_steps: length of the run.
        tokenizer: of the policy.
        train_loader: endless source of prompts, with a state that a checkpoint keeps.
        val_loader: the held-out set, in batches.
        reward_manager: scores responses; the trainer runs a copy of it in a process of its own.
        device: "cuda" or "cpu".
        tracker: where metrics go.
        resume_point: the checkpoint to go on from; None starts from the model's own weights.
    """

    _has_warned_of_no_weights = False

    def __init__(
        self,
        config: PPOConfig,
        plan: BatchPlan,
        training_steps: int,
        tokenizer: PreTrainedTokenizerBase,
        train_loader: PromptLoader,
        val_loader: Iterable[dict[str, Any]],
        reward_manager: AutoRewardManager,
        device: str,
        tracker: Tracker,
        resume_point: ResumePoint | None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.training_steps = training_steps
        self.tokenizer = tokenizer
        self.train_loader = train_loader
        self.reward_manager = reward_manager
        self.device = device
        self.tracker = tracker
        self.resume_point = resume_point
        self.validator = Validator(val_loader, self._generate_for_validation, self._score_now, tokenizer)
        self.workers: WorkerGroup | None = None
        self.reward_actor: ray.actor.ActorHandle | None = None
        self.global_step = 0
        self.best_step: int | None = None
        self.best_score: float | None = None
        self.last_validation: tuple[int, ValidationResult] | None = None
        self.last_saved_step: int | None = None

    # ---- life ----

    def init_workers(self) -> None:
        """Starts the reward actor and one worker per device, and loads the policy into them.

        Raises:
            ValueError: the Ray cluster is too small for them.
        """
        self._require_cpus()
        self.workers = WorkerGroup(
            FSDPWorker,
            num_nodes=self.config.trainer.nnodes,
            workers_per_node=self.config.trainer.n_gpus_per_node,
            device=self.device,
            config=self.config,
            plan=self.plan,
            training_steps=self.training_steps,
        )
        reward_class = ray.remote(num_cpus=self.config.worker.reward.num_cpus)(AutoRewardManager)
        self.reward_actor = reward_class.remote(self.reward_manager.config, self.reward_manager.tokenizer)
        self.tracker.phase("load")
        self.workers.init_model()

    def _require_cpus(self) -> None:
        """The reward actor waits for ever where the workers leave it no CPU: say so first."""
        num_cpus = self.config.worker.reward.num_cpus
        wanted, present = self.plan.world_size + num_cpus, int(ray.cluster_resources().get("CPU", 0))
        if wanted > present:
            raise ValueError(
                f"{self.plan.world_size} workers (trainer.nnodes x trainer.n_gpus_per_node) with one CPU each and "
                f"worker.reward.num_cpus={num_cpus} ask for {wanted} CPUs, but Ray sees {present}; lower them or add "
                "nodes"
            )

    def shutdown(self) -> None:
        """Ends every process this trainer started."""
        if self.workers is not None:
            self.workers.shutdown()
        if self.reward_actor is not None:
            ray.kill(self.reward_actor)

    # ---- the loop ----

    def fit(self) -> None:
        """Trains to the end of the run, from wherever the checkpoint left off."""
        self._resume()
        self._validate_before_training()
        for step in self._remaining_steps():
            record = StepRecord(step, on_phase=self.tracker.phase)
            with record.timed("step"):
                batch = self._rollout(record)
                batch = self._balance_across_ranks(batch, record)
                rewards = self._start_rewards(batch)
                batch = self._compute_log_probs(batch, record)
                batch, reward_values = self._await_rewards(batch, rewards, record)
                batch = self._attach_token_weights(batch, reward_values, record)
                batch = self._compute_advantages(batch, record)
                self._update_actor(batch, record)
                self._validate_if_due(record)
                self._save_if_due(record)
            self._log(batch, record)
        self._finish()

    def _remaining_steps(self) -> Iterator[int]:
        if self.config.trainer.val_only:
            return
        while self.global_step < self.training_steps:
            self.global_step += 1
            yield self.global_step

    def _rollout(self, record: StepRecord) -> DataProto:
        """Draws prompts until the step has enough, and n responses for each.

        Adds: everything `Rollout.generate` does, and `uid`, `ground_truth`, `prompt_text`, `extra`,
        `multi_modal_data`.
        """
        sampling = Sampling.for_training(self.config.worker.rollout)
        draws: list[DataProto] = []
        with record.timed("gen"), self._awake_rollout_engine():
            while sum(len(draw) for draw in draws) < self.plan.sequences_per_step:
                prompts = self._prompts_from(self.train_loader.draw())
                draws.append(self._generate(prompts, sampling, seed_parts=(TRAIN, record.step, len(draws))))
        return DataProto.concat(draws)[: self.plan.sequences_per_step]

    def _balance_across_ranks(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reorders rows so that every rank gets as many rows and about as many tokens.

        Reads: `attention_mask`. Mini-batches keep their rows, so the optimizer steps do not depend on W.
        """
        lengths = batch.batch["attention_mask"].sum(dim=1).tolist()
        order = balanced_order(lengths, self.plan.world_size, self.plan.mini_batches)
        batch.reorder(torch.tensor(order))
        record.add(seqlen_metrics(lengths, order, self.plan.world_size))
        return batch

    def _start_rewards(self, batch: DataProto) -> ray.ObjectRef:
        """Sends the responses to the reward actor, which works while the workers do.

        Reads: `responses`, `response_mask`, `ground_truth`, `prompt_text`, `uid`, `multi_modal_data`, `extra`.
        """
        return self._send_to_reward(batch, split="train")

    def _compute_log_probs(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: sequence tensors, media. Adds: `old_log_probs`; `attention_mass` and `attention_keys` if they are
        collected; `ref_log_probs` unless KL is off."""
        sequences = _model_inputs(batch)
        with record.timed("old"):
            batch = batch.union(self.workers.compute_log_probs(sequences))
        if not self.config.algorithm.disable_kl:
            with record.timed("ref"):
                batch = batch.union(self.workers.compute_ref_log_probs(sequences))
        return batch

    def _await_rewards(
        self, batch: DataProto, rewards: ray.ObjectRef, record: StepRecord
    ) -> tuple[DataProto, dict[str, list[Any]]]:
        """Adds: `token_level_scores`. Beside the batch it returns what the reward function gave, by key.

        The time recorded is the wait that the passes did not hide.
        """
        with record.timed("reward"):
            token_level_scores, values_by_key = ray.get(rewards)
        batch.batch["token_level_scores"] = token_level_scores
        means = reduce_metrics(_without_token_weights(values_by_key))
        record.add({f"reward/{key}": value for key, value in means.items()})
        return batch, values_by_key

    def _attach_token_weights(
        self, batch: DataProto, reward_values: dict[str, list[Any]], record: StepRecord
    ) -> DataProto:
        """Reads: `response_mask`, `attention_mask`, and `attention_mass`, `attention_keys` if they were collected.
        Adds: `token_weights`, if they are enabled and there is something to weigh by."""
        algorithm = self.config.algorithm
        record.add(compute_attention_metrics(batch))
        token_weights = self._maybe_compute_token_weights(batch, reward_values)
        if token_weights is not None:
            batch.batch["token_weights"] = token_weights
        if algorithm.enable_token_weights:
            record.add(compute_token_weight_metrics(batch, algorithm.token_weight_clip))
        return batch

    def _maybe_compute_token_weights(
        self, batch: DataProto, reward_metrics: dict[str, list[Any]]
    ) -> torch.Tensor | None:
        """Weights (N, R) float32 for the actor's loss, zero outside the responses; None to train without.

        What the reward function returned under `token_weights` comes first; samples without it take VGR weights from
        the collected attention, and weigh 1 where there is none either.

        Reads: `response_mask`, and `attention_mass`, `attention_keys` if they were collected.

        Args:
            reward_metrics: values per sample of every key that the reward function returned.

        Raises:
            ValueError: the reward function's weights are not finite, negative, or more than the response's tokens.
        """
        algorithm, streams = self.config.algorithm, batch.batch
        if not algorithm.enable_token_weights:
            return None
        token_weights = choose_token_weights(
            reward_metrics.get(TOKEN_WEIGHTS),
            streams.get("attention_mass"),
            streams.get("attention_keys"),
            streams["response_mask"],
            algorithm.token_weight_clip,
            algorithm.token_weight_smooth_sigma,
        )
        if token_weights is None and not self._has_warned_of_no_weights:
            self._has_warned_of_no_weights = True
            logger.warning(
                "algorithm.enable_token_weights=true, but there is nothing to weigh tokens by, so training goes on "
                "unweighted: set worker.rollout.collect_attentions=true, or let the reward function return %r",
                TOKEN_WEIGHTS,
            )
        return token_weights

    def _compute_advantages(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: `token_level_scores`, `response_mask`, `uid`, log-probs. Adds: `token_level_rewards`, `advantages`,
        `returns`."""
        algorithm = self.config.algorithm
        streams = batch.batch
        with record.timed("adv"):
            streams["token_level_rewards"] = streams["token_level_scores"]
            if not algorithm.disable_kl and not algorithm.use_kl_loss:
                kl = compute_kl(streams["old_log_probs"], streams["ref_log_probs"], algorithm.kl_penalty)
                streams["token_level_rewards"], mean_kl = apply_kl_penalty(
                    streams["token_level_scores"], kl, streams["response_mask"], algorithm.kl_coef
                )
                record.add({"actor/kl_penalty": mean_kl, "actor/kl_coef": algorithm.kl_coef})
            streams["advantages"], streams["returns"] = ADVANTAGE_ESTIMATORS[algorithm.adv_estimator](
                streams["token_level_rewards"], streams["response_mask"], batch.non_tensor_batch["uid"]
            )
        return batch

    def _update_actor(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: sequence tensors, media, and all the (N, R) streams of the loss."""
        if record.step < self.config.trainer.critic_warmup:
            return
        streams = ["old_log_probs", "advantages"]
        streams += [name for name in ("ref_log_probs", "token_weights") if name in batch.batch.keys()]
        with record.timed("update_actor"):
            record.add(self.workers.update_actor(_model_inputs(batch, *streams)))

    def _validate_if_due(self, record: StepRecord) -> None:
        if _is_due(record.step, self.config.trainer.val_freq):
            with record.timed("validation"):
                record.add(self._validate().metrics)

    def _save_if_due(self, record: StepRecord) -> None:
        if _is_due(record.step, self.config.trainer.save_freq):
            with record.timed("save_checkpoint"):
                self._save()

    def _log(self, batch: DataProto, record: StepRecord) -> None:
        record.add(compute_data_metrics(batch))
        record.add(compute_timing_metrics(batch, record.timings))
        record.add(compute_throughput_metrics(batch, record.timings, self.plan.world_size))
        self.tracker.log(record.metrics, record.step)

    def _validate_before_training(self) -> None:
        if self.config.trainer.val_before_train:
            self.tracker.log(self._validate().metrics, self.global_step)

    def _finish(self) -> None:
        """The last step is always validated and saved, whatever the frequencies."""
        if self.config.trainer.val_only:
            return
        if self.last_validation is None or self.last_validation[0] != self.global_step:
            self.tracker.log(self._validate().metrics, self.global_step)
        self.tracker.phase("save_checkpoint")
        if self.last_saved_step != self.global_step:
            self._save()
        else:
            self._track_checkpoint()

    # ---- prompts and responses ----

    def _prompts_from(self, features: dict[str, Any]) -> DataProto:
        """One loader batch as the workers take it: every prompt named, every image put in the store once."""
        handles = [
            None if media is None else [MediaHandle.put(image) for image in media["images"]]
            for media in features["multi_modal_data"]
        ]
        uids = [str(uuid.uuid4()) for _ in handles]
        return DataProto.from_single_dict({**features, "multi_modal_data": _objects(handles), "uid": _objects(uids)})

    def _generate(self, prompts: DataProto, sampling: Sampling, seed_parts: tuple[int, ...]) -> DataProto:
        """Responses for B prompts beside the prompts' own streams, repeated: N rows, those of a prompt together."""
        inputs = prompts.select(
            ["input_ids", "attention_mask", "position_ids"], ["raw_prompt_ids", "multi_modal_data"], []
        )
        inputs.meta_info = {"sampling": sampling, "seed_parts": seed_parts}
        padded, pad_size = pad_dataproto_to_divisor(inputs, self.plan.world_size)
        responses = unpad_dataproto(self.workers.generate_sequences(padded), pad_size * sampling.n)
        carried = prompts.select([], ["uid", "ground_truth", "prompt_text", "extra", "multi_modal_data"], [])
        return responses.union(carried.repeat(sampling.n, interleave=True))

    @contextmanager
    def _awake_rollout_engine(self) -> Iterator[None]:
        self.workers.prepare_rollout_engine()
        try:
            yield
        finally:
            if self.workers.alive:  # else there is nothing to release, and the failure must not be hidden
                self.workers.release_rollout_engine()

    # ---- rewards ----

    def _send_to_reward(self, batch: DataProto, split: str) -> ray.ObjectRef:
        data = batch.select(
            ["responses", "response_mask"], ["ground_truth", "uid", "prompt_text", "multi_modal_data", "extra"], []
        )
        data.meta_info = {"step": self.global_step, "split": split}
        return self.reward_actor.compute_reward.remote(data)

    def _score_now(self, batch: DataProto) -> tuple[list[float], dict[str, list[float]]]:
        scores, values_by_key = ray.get(self._send_to_reward(batch, split="val"))
        return scores.sum(dim=1).tolist(), _without_token_weights(values_by_key)

    # ---- validation ----

    def _generate_for_validation(self, features: dict[str, Any], number: int) -> DataProto:
        sampling = Sampling.for_validation(self.config.worker.rollout)
        return self._generate(self._prompts_from(features), sampling, seed_parts=(VAL, number))

    def _validate(self) -> ValidationResult:
        self.tracker.phase("validation")
        with self._awake_rollout_engine():
            result = self.validator.run()
        self.last_validation = (self.global_step, result)
        self._log_samples(result)
        return result

    def _log_samples(self, result: ValidationResult) -> None:
        """A fixed choice of samples, the same prompts at every validation."""
        count = self.config.trainer.val_generations_to_log
        if count > 0:
            samples = sorted(result.samples, key=lambda sample: sample[0])
            chosen = np.random.RandomState(42).permutation(len(samples))[:count]
            self.tracker.log_generations([samples[index] for index in chosen], self.global_step)

    # ---- checkpoints ----

    def _save(self) -> None:
        trainer = self.config.trainer
        folder = step_folder(trainer.save_checkpoint_path, self.global_step)
        self.workers.save_checkpoint(os.path.join(folder, "actor"), trainer.save_model_only)
        torch.save(self.train_loader.state_dict(), os.path.join(folder, DATALOADER_FILE))
        self.last_saved_step = self.global_step
        self._track_checkpoint()

    def _track_checkpoint(self) -> None:
        """Writes down that this step's checkpoint is the latest, and perhaps the best; removes what is obsolete.

        Only a score of the saved weights themselves can make a checkpoint the best.
        """
        trainer = self.config.trainer
        if self.last_validation is not None and self.last_validation[0] == self.global_step:
            score = self.last_validation[1].score
            if self.best_score is None or score > self.best_score:
                self.best_step, self.best_score = self.global_step, score
        root = trainer.save_checkpoint_path
        write_tracker(root, self.global_step, self.best_step, self.best_score)
        remove_obsolete_ckpt(root, self.global_step, self.best_step, trainer.save_limit)

    def _resume(self) -> None:
        """Takes up model, optimizer and data where the checkpoint left them."""
        point, trainer = self.resume_point, self.config.trainer
        if point is None:
            return
        actor_folder = os.path.join(point.folder, "actor")
        model_only = not has_optimizer(actor_folder)
        if model_only:
            logger.warning("%s has the model only: optimizer and learning-rate schedule start afresh", actor_folder)
        self.workers.load_checkpoint(actor_folder, model_only)
        loader_file = os.path.join(point.folder, DATALOADER_FILE)
        if os.path.exists(loader_file):
            self.train_loader.load_state_dict(torch.load(loader_file))
        else:
            logger.warning("%s does not exist: the data starts from its first epoch", loader_file)
        self.global_step = point.step
        if point.is_under(trainer.save_checkpoint_path):
            self.last_saved_step = point.step
        self.best_step, self.best_score = point.best_step, point.best_score
        self.tracker.note(f"resumed from {point.folder} at step {point.step} of {self.training_steps}")
        if point.step >= self.training_steps:
            logger.warning(
                "%s has reached the run's last step, %d: raise trainer.max_steps or trainer.total_epochs to go on",
                point.folder,
                self.training_steps,
            )


def _model_inputs(batch: DataProto, *streams: str) -> DataProto:
    """What a forward pass over the sequences needs, and the named (N, R) streams."""
    sequence = ["input_ids", "attention_mask", "position_ids", "responses", "response_mask"]
    return batch.select([*sequence, *streams], ["multi_modal_data"], [])


def _without_token_weights(values_by_key: dict[str, list[Any]]) -> dict[str, list[float]]:
    """The reward function's numbers, which can be averaged."""
    return {key: values for key, values in values_by_key.items() if key != TOKEN_WEIGHTS}


def _objects(values: list[Any]) -> np.ndarray:
    """A one-dimensional object array; numpy by itself would make rows of equal length a matrix."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _is_due(step: int, frequency: int) -> bool:
    return frequency > 0 and step % frequency == 0
