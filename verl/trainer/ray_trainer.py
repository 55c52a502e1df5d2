# SPDX-License-Identifier: Apache-2.0
"""The training loop: one controller that drives the workers, step by step.

Shapes: B prompts, n responses each, N = B * n rows, R response length, W workers. DataProto batches hold the streams;
each phase says which it reads and which it adds.
"""

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from transformers import PreTrainedTokenizerBase

from verl.algorithms.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from verl.algorithms.group_filter import informative_rows
from verl.algorithms.importance import truncated_importance_weights
from verl.algorithms.kl import adapt_kl_coef, apply_kl_penalty, compute_kl
from verl.algorithms.policy_loss import POLICY_LOSSES
from verl.data.loader import BatchLoader, PromptLoader
from verl.data.vision import MediaHandle
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from verl.single_controller.lost_processes import PROCESS_LOST, node_of, run_ended_by
from verl.single_controller.worker_group import WorkerGroup
from verl.single_controller.worker_processes import WorkerProcesses
from verl.trainer.config import PPOConfig
from verl.trainer.metrics import (
    compute_attention_metrics,
    compute_data_metrics,
    compute_rollout_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    compute_token_weight_metrics,
    largest_of_workers,
)
from verl.trainer.validator import ValidationResult, Validator
from verl.utils.attention_token_weights import choose_token_weights
from verl.utils.batch_plan import BatchPlan
from verl.utils.checkpoint import (
    DATALOADER_FILE,
    KL_COEF_FILE,
    ResumePoint,
    read_kl_coef,
    remove_obsolete_ckpt,
    step_folder,
    write_kl_coef,
    write_tracker,
)
from verl.utils.seqlen_balancing import balanced_order, seqlen_metrics
from verl.utils.step_record import StepRecord
from verl.utils.tracking import Tracker
from verl.workers.fsdp_checkpoint import has_optimizer
from verl.workers.fsdp_workers import FSDPWorker
from verl.workers.reward.function import place_scores, reward_samples
from verl.workers.reward.user_function import TOKEN_WEIGHTS, RewardFunction, TextDecoder, values_by_key
from verl.workers.rollout.base import Sampling

logger = logging.getLogger(__name__)

TRAIN, VAL = 0, 1
"""First part of every rollout seed, so that validation never repeats training's draws."""


class RayDAPOTrainer:
    """Trains a policy, and a critic where the advantages need one, on a Ray cluster.

    Use: `trainer.init_workers()` then `trainer.fit()`, and `trainer.shutdown()` in any case.

    Args:
        config: of the run.
        plan: its batch numbers.
        training_steps: length of the run.
        tokenizer: of the policy.
        train_loader: endless source of prompts, with a state that a checkpoint keeps.
        val_loader: the held-out set, in batches.
        decoder: makes text of token ids for the reward function, which runs in a process of its own.
        processes: where the workers live; they stay their owner's to end.
        tracker: where metrics go.
        resume_point: the checkpoint to go on from; None starts from the model's own weights.
    """

    def __init__(
        self,
        config: PPOConfig,
        plan: BatchPlan,
        training_steps: int,
        tokenizer: PreTrainedTokenizerBase,
        train_loader: PromptLoader,
        val_loader: BatchLoader,
        decoder: TextDecoder,
        processes: WorkerProcesses,
        tracker: Tracker,
        resume_point: ResumePoint | None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.training_steps = training_steps
        self.tokenizer = tokenizer
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.decoder = decoder
        self.processes = processes
        self.tracker = tracker
        self.resume_point = resume_point
        self.validator = Validator(val_loader, self._generate_for_validation, self._score_now, tokenizer)
        self.workers: WorkerGroup | None = None
        self.reward_actor: ray.actor.ActorHandle | None = None
        self._reward_node: ray.ObjectRef | None = None
        self.global_step = 0
        self.kl_coef = config.algorithm.kl_coef
        self.best_step: int | None = None
        self.best_score: float | None = None
        self.last_validation: tuple[int, ValidationResult] | None = None
        self.last_saved_step: int | None = None
        self._has_warned_of_no_weights = False

    # ---- life ----

    def init_workers(self) -> None:
        """Starts the reward actor, and loads the policy into one worker per device."""
        reward_class = ray.remote(num_cpus=self.config.worker.reward.num_cpus)(RewardFunction)
        self.reward_actor = reward_class.remote(self.config.worker.reward, self.decoder)
        self._reward_node = node_of(self.reward_actor)
        self.tracker.phase("load", "loading the model")
        self.workers = WorkerGroup(
            self.processes,
            FSDPWorker,
            shares=self.plan.shares,
            config=self.config,
            plan=self.plan,
            policy_loss=POLICY_LOSSES[self.config.worker.actor.loss_type],
            training_steps=self.training_steps,
        )
        self.workers.init_model()

    def shutdown(self) -> None:
        """Ends the reward actor and frees the workers."""
        if self.workers is not None:
            self.workers.release()
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
                batch = self._compute_values(batch, record)
                batch = self._await_rewards(batch, rewards, record)
                batch = self._attach_token_weights(batch, record)
                batch = self._compute_advantages(batch, record)
                self._update_critic(batch, record)
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
        """Draws prompts, and n responses for each, until enough groups carry signal.

        A group is all responses to one prompt; those beyond the step's number are dropped, the last drawn first. What
        is scored here, to filter groups or for baselines, is part of the phase `gen`, as in EasyR1.

        Adds: everything `_generate` does; what `_receive_rewards` does, if groups are filtered; `reward_baselines`, if
        the estimator needs them.

        Raises:
            RuntimeError: the draws allowed did not give enough groups.
        """
        sampling = Sampling.for_training(self.config.worker.rollout)
        draws: list[DataProto] = []
        with record.timed("gen"), self._awake_rollout_engine():
            while self._groups_in(draws) < self.plan.prompts_per_step:
                self._require_a_draw_left(draws, record)
                prompts = self._prompts_from(self.train_loader.draw())
                draw = self._generate(prompts, sampling, seed_parts=(TRAIN, record.step, len(draws)))
                draws.append(self._keep_informative(draw, record))
            batch = DataProto.concat(draws)[: self.plan.sequences_per_step]
            if self.config.algorithm.needs_baselines:
                self._add_baselines(batch, record)
        if self.config.algorithm.online_filtering:
            kept_share = self._groups_in(draws) / (len(draws) * self.plan.prompts_per_draw)
            record.add({"filter/draws": len(draws), "filter/kept_share": kept_share})
        return batch

    def _balance_across_ranks(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reorders rows so that every rank gets as many rows and about as many tokens.

        Reads: `attention_mask`. Mini-batches keep their rows, so the optimizer steps do not depend on W.
        """
        lengths = batch.batch["attention_mask"].sum(dim=1).tolist()
        order = balanced_order(lengths, self.plan.world_size, self.plan.pieces_to_balance)
        batch.reorder(torch.tensor(order))
        record.add(seqlen_metrics(lengths, order, self.plan.world_size))
        return batch

    def _start_rewards(self, batch: DataProto) -> ray.ObjectRef | None:
        """Sends the responses to the reward actor, which works while the workers do; None if they are scored already.

        Reads: `responses`, `response_mask`, `ground_truth`, `prompt_text`, `uid`, `multi_modal_data`, `extra`.
        """
        is_scored = "token_level_scores" in batch.batch.keys()
        return None if is_scored else self._send_to_reward(batch)

    def _compute_log_probs(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: sequence tensors, media, `rollout_log_probs`. Adds: `old_log_probs`; `attention_mass` and
        `attention_keys` if they are collected; unless KL is off `ref_log_probs`, or, of a full KL, `ref_kl` if it is
        for the reward; `importance_weights` if asked for."""
        algorithm = self.config.algorithm
        sequences = _model_inputs(batch)
        with record.timed("old"):
            batch = batch.union(self.workers.compute_log_probs(sequences))
        streams, cap = batch.batch, self.config.worker.rollout.importance_cap
        if cap is not None:
            streams["importance_weights"] = truncated_importance_weights(
                streams["old_log_probs"], streams["rollout_log_probs"], streams["response_mask"], cap
            )
        record.add(compute_rollout_metrics(batch, cap))
        if algorithm.kl_penalty == "full" and algorithm.kl_in_reward:
            with record.timed("ref"):
                batch = batch.union(self.workers.compute_ref_kl(sequences))
        elif algorithm.kl_penalty != "full" and not algorithm.disable_kl:
            with record.timed("ref"):
                batch = batch.union(self.workers.compute_ref_log_probs(sequences))
        return batch

    def _compute_values(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: sequence tensors, media. Adds: `values`, where there is a critic."""
        if self.plan.critic is None:
            return batch
        with record.timed("values"):
            return batch.union(self.workers.compute_values(_model_inputs(batch)))

    def _await_rewards(self, batch: DataProto, rewards: ray.ObjectRef | None, record: StepRecord) -> DataProto:
        """Adds: what `_receive_rewards` does, unless the batch has it already."""
        return batch if rewards is None else self._receive_rewards(batch, rewards, record)

    def _attach_token_weights(self, batch: DataProto, record: StepRecord) -> DataProto:
        """Reads: `response_mask`, `attention_mask`, `reward_results`, and `attention_mass`, `attention_keys` if they
        were collected. Adds: `token_weights`, if they are enabled and there is something to weigh by."""
        algorithm = self.config.algorithm
        record.add(compute_attention_metrics(batch))
        reward_values = values_by_key(batch.non_tensor_batch["reward_results"])
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
        """Reads: `token_level_scores`, `response_mask`, `uid`; for KL in the reward `ref_kl`, or `old_log_probs` and
        `ref_log_probs`; `values` (N, R) or `reward_baselines` (N,) where the estimator needs them. Adds:
        `token_level_rewards`, `advantages`, `returns`."""
        algorithm = self.config.algorithm
        streams = batch.batch
        with record.timed("adv"):
            streams["token_level_rewards"] = streams["token_level_scores"]
            if algorithm.kl_in_reward:
                record.add(self._take_kl_off_the_rewards(batch, adapts=self._actor_learns(record.step)))
            inputs = AdvantageInputs(
                streams["token_level_rewards"],
                streams["response_mask"],
                batch.non_tensor_batch["uid"],
                values=streams.get("values"),
                reward_baselines=streams.get("reward_baselines"),
                gamma=algorithm.gamma,
                lam=algorithm.lam,
            )
            streams["advantages"], streams["returns"] = ADVANTAGE_ESTIMATORS[algorithm.adv_estimator](inputs)
        return batch

    def _take_kl_off_the_rewards(self, batch: DataProto, adapts: bool) -> dict[str, float]:
        """Writes over `token_level_rewards`; an adaptive coefficient then follows the KL, for the next step.

        Args:
            adapts: whether it may; a policy that only waits for its critic has no KL to follow.
        """
        algorithm, streams = self.config.algorithm, batch.batch
        kl = streams.get("ref_kl")
        if kl is None:
            kl = compute_kl(streams["old_log_probs"], streams["ref_log_probs"], algorithm.kl_penalty)
        streams["token_level_rewards"], mean_kl = apply_kl_penalty(
            streams["token_level_scores"], kl, streams["response_mask"], self.kl_coef
        )
        metrics = {"actor/kl_penalty": mean_kl, "actor/kl_coef": self.kl_coef}
        if algorithm.kl_coef_adapts and adapts:
            self.kl_coef = adapt_kl_coef(self.kl_coef, mean_kl, len(batch), algorithm.kl_target, algorithm.kl_horizon)
        return metrics

    def _update_critic(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: sequence tensors, media, `values`, `returns`."""
        if self.plan.critic is None:
            return
        with record.timed("update_critic"):
            record.add(self.workers.update_critic(_model_inputs(batch, "values", "returns")))

    def _actor_learns(self, step: int) -> bool:
        return step >= self.config.trainer.critic_warmup

    def _update_actor(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: sequence tensors, media, and all the (N, R) streams of the loss."""
        if not self._actor_learns(record.step):
            return
        streams = ["old_log_probs", "advantages"]
        optional = ("ref_log_probs", "token_weights", "importance_weights")
        streams += [name for name in optional if name in batch.batch.keys()]
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
        record.add(largest_of_workers(self.workers.memory_metrics()))
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
        """One loader batch as the workers take it: every prompt named, every medium put in the store once."""
        handles = [
            None if media is None else [MediaHandle.put(medium) for medium in (*media["images"], *media["videos"])]
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
        carried = prompts.select(
            [], ["uid", "ground_truth", "prompt_text", "extra", "raw_prompt_ids", "multi_modal_data"], []
        )
        return responses.union(carried.repeat(sampling.n, interleave=True))

    def _keep_informative(self, draw: DataProto, record: StepRecord) -> DataProto:
        """The rows of those groups that carry signal, with their rewards; all as they are if none is to be filtered.

        Reads: `uid`, and what the reward function is shown.
        """
        algorithm = self.config.algorithm
        if not algorithm.online_filtering:
            return draw
        draw = self._receive_rewards(draw, self._send_to_reward(draw), record)
        numbers = _without_token_weights(values_by_key(draw.non_tensor_batch["reward_results"]))
        bounds = (algorithm.filter_low, algorithm.filter_high)
        return draw[informative_rows(numbers, draw.non_tensor_batch["uid"], algorithm.filter_key, *bounds)]

    def _groups_in(self, draws: list[DataProto]) -> int:
        return sum(len(draw) for draw in draws) // self.plan.responses_per_prompt

    def _require_a_draw_left(self, draws: list[DataProto], record: StepRecord) -> None:
        """A step can run out of draws only where groups are filtered."""
        plan, algorithm = self.plan, self.config.algorithm
        if plan.most_draws is None or len(draws) < plan.most_draws:
            return
        mean = record.metrics[f"reward/{algorithm.filter_key}"]
        raise RuntimeError(
            f"step {record.step} needs data.rollout_batch_size={plan.prompts_per_step} groups with a mean "
            f"{algorithm.filter_key} between algorithm.filter_low={algorithm.filter_low} and "
            f"filter_high={algorithm.filter_high}, and has {self._groups_in(draws)} after "
            f"trainer.max_try_make_batch={len(draws)} draws of {plan.prompts_per_draw} prompts, "
            f"{len(draws) * plan.prompts_per_draw} in all, whose mean is {mean:.3f}; raise worker.rollout.n or "
            "trainer.max_try_make_batch (0: any number of draws), widen the bounds, or take prompts that the policy "
            "answers neither always nor never right"
        )

    def _add_baselines(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: what `_generate` made, the rows of a prompt side by side. Adds: `reward_baselines` (N,) float32, the
        score of the policy's greedy response to the row's prompt (ReMax, arXiv 2310.10505, Algorithm 1)."""
        greedy = replace(Sampling.for_training(self.config.worker.rollout), n=1, temperature=0.0)
        responses = self._generate(self._prompts_of(batch), greedy, seed_parts=(TRAIN, record.step))
        with record.timed("reward"):
            results = self._answer_of_reward(self._send_to_reward(responses))
        scores = torch.tensor([result["overall"] for result in results])  # (B,)
        batch.batch["reward_baselines"] = scores.repeat_interleave(self.plan.responses_per_prompt)

    def _prompts_of(self, batch: DataProto) -> DataProto:
        """The B prompts that N rows of responses, those of a prompt side by side, were generated from."""
        first_rows = batch[:: self.plan.responses_per_prompt]
        prompt_length = first_rows.batch["prompts"].shape[1]
        return DataProto.from_dict(
            {
                "input_ids": first_rows.batch["prompts"],
                "attention_mask": first_rows.batch["attention_mask"][:, :prompt_length],
                "position_ids": first_rows.batch["position_ids"][..., :prompt_length],
            },
            first_rows.non_tensor_batch,
        )

    @contextmanager
    def _awake_rollout_engine(self) -> Iterator[None]:
        self.workers.prepare_rollout_engine()
        try:
            yield
        finally:
            if self.workers.alive:  # else there is nothing to release, and the failure must not be hidden
                self.workers.release_rollout_engine()

    # ---- rewards ----

    def _send_to_reward(self, batch: DataProto) -> ray.ObjectRef:
        return self.reward_actor.score.remote(reward_samples(batch, self.global_step, split="train"))

    def _receive_rewards(self, batch: DataProto, rewards: ray.ObjectRef, record: StepRecord) -> DataProto:
        """Adds: `token_level_scores`, and `reward_results`, each row's own dict from the reward function.

        The metrics `reward/*` are means over every sample received in the step: with filtered groups, over those that
        are dropped too, as in EasyR1. The time recorded is the wait that nothing else hid.
        """
        with record.timed("reward"):
            batch = batch.union(place_scores(batch, self._answer_of_reward(rewards)))
        numbers = _without_token_weights(values_by_key(batch.non_tensor_batch["reward_results"]))
        record.average({f"reward/{key}": values for key, values in numbers.items()})
        return batch

    def _score_now(self, batch: DataProto) -> tuple[list[float], dict[str, list[float]]]:
        samples = reward_samples(batch, self.global_step, split="val")
        results = self._answer_of_reward(self.reward_actor.score.remote(samples))
        scores = torch.tensor([result["overall"] for result in results])  # (N,)
        return scores.tolist(), _without_token_weights(values_by_key(results))

    def _answer_of_reward(self, reference: ray.ObjectRef) -> list[dict[str, Any]]:
        """The result of every sample from the reward actor.

        Raises:
            RuntimeError: its process or its node is gone.
        """
        try:
            return ray.get(reference)
        except PROCESS_LOST as error:
            name = "the reward function's process"
            raise run_ended_by({name: error}, {name: ray.get(self._reward_node)}) from error

    # ---- validation ----

    def _generate_for_validation(self, features: dict[str, Any], number: int) -> DataProto:
        sampling = Sampling.for_validation(self.config.worker.rollout)
        return self._generate(self._prompts_from(features), sampling, seed_parts=(VAL, number))

    def _validate(self) -> ValidationResult:
        self.tracker.phase("validation", f"validating {len(self.val_loader.dataset)} prompts")
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
        self.workers.save_checkpoint(folder, trainer.save_model_only)
        torch.save(self.train_loader.state_dict(), os.path.join(folder, DATALOADER_FILE))
        if self.config.algorithm.kl_coef_adapts:
            write_kl_coef(folder, self.kl_coef)
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
        model_only = not has_optimizer(point.folder)
        if model_only:
            logger.warning("%s has the model only: optimizer and learning-rate schedule start afresh", point.folder)
        self.workers.load_checkpoint(point.folder, model_only)
        loader_file = os.path.join(point.folder, DATALOADER_FILE)
        if os.path.exists(loader_file):
            self.train_loader.load_state_dict(torch.load(loader_file))
        else:
            logger.warning("%s does not exist: the data starts from its first epoch", loader_file)
        if self.config.algorithm.kl_coef_adapts:
            self._resume_kl_coef(point.folder)
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

    def _resume_kl_coef(self, folder: str) -> None:
        kl_coef = read_kl_coef(folder)
        if kl_coef is not None:
            self.kl_coef = kl_coef
        else:
            path = os.path.join(folder, KL_COEF_FILE)
            logger.warning("%s does not exist: the KL coefficient starts from algorithm.kl_coef", path)


def _model_inputs(batch: DataProto, *streams: str) -> DataProto:
    """What a forward pass over the sequences needs, and the named (N, R) streams."""
    sequence = ["input_ids", "attention_mask", "position_ids", "responses", "response_mask"]
    return batch.select([*sequence, *streams], ["multi_modal_data"], [])


def _without_token_weights(reward_values: dict[str, list[Any]]) -> dict[str, list[float]]:
    """The reward function's numbers, which can be averaged."""
    return {key: values for key, values in reward_values.items() if key != TOKEN_WEIGHTS}


def _objects(values: list[Any]) -> np.ndarray:
    """A one-dimensional object array; numpy by itself would make rows of equal length a matrix."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _is_due(step: int, frequency: int) -> bool:
    return frequency > 0 and step % frequency == 0
