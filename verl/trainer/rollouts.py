# SPDX-License-Identifier: Apache-2.0
"""Draws prompts and generates responses with the workers, for training and for validation.

Shapes: B prompts, n responses each, N = B * n rows, the rows of a prompt side by side; P prompt length.
"""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from verl.algorithms.group_filter import informative_rows
from verl.data.loader import PromptLoader
from verl.data.vision import MediaHandle
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config import PPOConfig
from verl.trainer.rewards import RewardClient, numbers_by_key
from verl.trainer.step_record import StepRecord
from verl.trainer.streams import prompt_streams_read_by
from verl.utils.batch_plan import BatchPlan
from verl.workers.rollout.base import Sampling

logger = logging.getLogger(__name__)

TRAIN, VAL = 0, 1
"""First part of every rollout seed: validation never repeats random numbers of training."""


class Rollouts:
    """Generates batches of responses with the workers' engines, inside `awake()`.

    Args:
        config: the run's configuration.
        plan: the run's batch plan.
        workers: hold the rollout engines.
        loader: endless source of the training prompts.
        rewards: score responses, to tell which groups carry signal.
    """

    def __init__(
        self, config: PPOConfig, plan: BatchPlan, workers: WorkerGroup, loader: PromptLoader, rewards: RewardClient
    ) -> None:
        self.config = config
        self.plan = plan
        self.workers = workers
        self.loader = loader
        self.rewards = rewards

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside, the engines hold the current policy and their memory.

        A run that ends at once leaves them so: the workers may still be generating, the release would wait for that,
        and the time is for closing the loggers.
        """
        self.workers.prepare_rollout_engine()
        try:
            yield
        except Exception:
            self._let_engines_sleep()
            raise
        self._let_engines_sleep()

    def _let_engines_sleep(self) -> None:
        if self.workers.alive:  # otherwise nothing is to be released, and a second error would hide the first
            self.workers.release_rollout_engine()

    def draw(self, record: StepRecord) -> DataProto:
        """Responses to the step's prompts: draws until enough groups carry signal.

        A group is all responses to one prompt. Groups beyond the step's number are dropped, the last drawn first.

        Adds: what `_generate` adds; what `RewardClient.receive` adds, if groups are filtered.

        Raises:
            RuntimeError: too few groups after the allowed number of draws.
        """
        sampling = Sampling.for_training(self.config.worker.rollout)
        draws: list[DataProto] = []
        while self._groups_in(draws) < self.plan.prompts_per_step:
            self._require_remaining_draw(draws, record)
            prompts = self._prompts_from(self.loader.draw())
            draw = self._generate(prompts, sampling, seed_parts=(TRAIN, record.step, len(draws)))
            draws.append(self._keep_informative(draw, record))
            self._log_draw(draws, record)
        if self.config.algorithm.online_filtering:
            kept_share = self._groups_in(draws) / (len(draws) * self.plan.prompts_per_draw)
            record.add({"filter/draws": len(draws), "filter/kept_share": kept_share})
        return DataProto.concat(draws)[: self.plan.sequences_per_step]

    def add_baselines(self, batch: DataProto, record: StepRecord) -> None:
        """Reads: what `draw` made. Adds: `reward_baselines` (N,) float32, the score of the policy's greedy response to
        the row's prompt (ReMax, arXiv 2310.10505, Algorithm 1)."""
        greedy = replace(Sampling.for_training(self.config.worker.rollout), n=1, temperature=0.0)
        responses = self._generate(self._prompts_of(batch), greedy, seed_parts=(TRAIN, record.step))
        scores = self.rewards.totals(responses, record.step, record)  # (B,)
        batch.batch["reward_baselines"] = scores.repeat_interleave(self.plan.responses_per_prompt)

    def for_validation(self, features: dict[str, Any], number: int) -> DataProto:
        """Responses to one batch of the held-out loader, the `number`-th. Adds: what `_generate` adds."""
        sampling = Sampling.for_validation(self.config.worker.rollout)
        return self._generate(self._prompts_from(features), sampling, seed_parts=(VAL, number))

    def with_media(self, rows: DataProto, features: dict[str, Any]) -> DataProto:
        """Rows of a validation with their media.

        Args:
            features: the rows' prompts, read once more.
        """
        media = self._prompts_from(features).non_tensor_batch["multi_modal_data"]
        return rows.union(DataProto.from_dict(non_tensors={"multi_modal_data": media}))

    def _prompts_from(self, features: dict[str, Any]) -> DataProto:
        """A loader batch for the workers: each prompt gets a uid, each image or video is stored once."""
        handles = [
            None if media is None else [MediaHandle.put(medium) for medium in (*media["images"], *media["videos"])]
            for media in features["multi_modal_data"]
        ]
        uids = [str(uuid.uuid4()) for _ in handles]
        return DataProto.from_single_dict({**features, "multi_modal_data": _objects(handles), "uid": _objects(uids)})

    def _prompts_of(self, batch: DataProto) -> DataProto:
        """The B prompts of N rows of responses."""
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

    def _generate(self, prompts: DataProto, sampling: Sampling, seed_parts: tuple[int, ...]) -> DataProto:
        """Responses for B prompts, with the prompts' streams repeated: N rows."""
        inputs = prompts.select(*prompt_streams_read_by("generate", self.config), [])
        inputs.meta_info = {"sampling": sampling, "seed_parts": seed_parts}
        padded, pad_size = pad_dataproto_to_divisor(inputs, self.plan.world_size)
        responses = unpad_dataproto(self.workers.generate_sequences(padded), pad_size * sampling.n)
        described = prompts.select(*prompt_streams_read_by("repeat", self.config), [])
        return responses.union(described.repeat(sampling.n, interleave=True))

    def _keep_informative(self, draw: DataProto, record: StepRecord) -> DataProto:
        """The rows of the groups that carry signal, with their rewards; without filtering, all rows unchanged.

        Reads: `uid`, and the inputs of the reward function.
        """
        algorithm = self.config.algorithm
        if not algorithm.online_filtering:
            return draw
        draw = self.rewards.receive(draw, self.rewards.send(draw, record.step), record)
        bounds = (algorithm.filter_low, algorithm.filter_high)
        return draw[
            informative_rows(numbers_by_key(draw), draw.non_tensor_batch["uid"], algorithm.filter_key, *bounds)
        ]

    def _log_draw(self, draws: list[DataProto], record: StepRecord) -> None:
        """Logs a line per draw, since a step that filters groups may draw many times."""
        if self.config.algorithm.online_filtering:
            logger.info(
                "step %d, draw %d: %d of %d groups carry signal, %d of %d collected",
                record.step,
                len(draws),
                self._groups_in(draws[-1:]),
                self.plan.prompts_per_draw,
                self._groups_in(draws),
                self.plan.prompts_per_step,
            )

    def _groups_in(self, draws: list[DataProto]) -> int:
        return sum(len(draw) for draw in draws) // self.plan.responses_per_prompt

    def _require_remaining_draw(self, draws: list[DataProto], record: StepRecord) -> None:
        """Raises when no draw is left, which can happen only with filtered groups."""
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
            "trainer.max_try_make_batch (0: any number of draws), widen the bounds, or use prompts that the policy "
            "answers correctly in some responses but not in all"
        )


def _objects(values: list[Any]) -> np.ndarray:
    """A one-dimensional object array; numpy by itself would make rows of equal length a matrix."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
