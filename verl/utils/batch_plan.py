# SPDX-License-Identifier: Apache-2.0
"""Computes, checks and describes all batch sizes of a run before it starts.

The configuration counts prompts; sequences are prompts times `worker.rollout.n`. W is the number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd, lcm

from verl.trainer.config import PPOConfig
from verl.workers.actor.config import TrainedModelConfig

COMPARING_ESTIMATORS = ("grpo", "grpo_passk", "rloo")


@dataclass(frozen=True)
class ModelPlan:
    """The batch sizes of one trained model, the actor or the critic."""

    prompts_per_mini_batch: int
    """Prompts per optimizer step."""
    sequences_per_mini_batch: int
    """Sequences per optimizer step, over all workers."""
    mini_batches: int
    """Optimizer steps in one pass over the step's batch."""
    sequences_per_rank_per_mini_batch: int
    """Sequences per optimizer step on one worker."""
    update_micro_batch_size: int
    """Sequences in one forward and backward of a worker. With dynamic batching, the limit is the number of tokens that
    they have at full length."""
    update_micro_batches: int
    """Micro-batches per optimizer step on a worker, without dynamic batching."""
    experience_micro_batch_size: int
    """Sequences in one forward without gradient of a worker."""
    optimizer_steps_per_step: int
    """Optimizer steps per training step, over all `ppo_epochs`."""

    @classmethod
    def from_config(
        cls, name: str, model: TrainedModelConfig, prompts_per_step: int, n: int, world_size: int
    ) -> ModelPlan:
        """Compute the numbers of the model in the section `name`.

        Raises:
            ValueError: a number is not divisible as required; the message has the calculation and the nearest values.
        """
        batch_size, micro_batch_size = model.global_batch_size, model.micro_batch_size_per_device_for_update
        experience_size = model.micro_batch_size_per_device_for_experience
        batch, workers = f"{name}.global_batch_size", f"{world_size} workers"
        step, sequences = f"data.rollout_batch_size={prompts_per_step}", prompts_per_step * n
        step_text = f"{step} x worker.rollout.n={n} = {sequences} sequences"
        micro_batch = f"{name}.micro_batch_size_per_device"
        _require_divisor(batch, batch_size, prompts_per_step, step)
        _require_divisor(f"{micro_batch}_for_experience", experience_size, sequences, step_text)
        _require_multiple(batch, batch_size, world_size, workers, n)
        per_rank = batch_size * n // world_size
        share = f"{batch}={batch_size} x worker.rollout.n={n} / {workers} = {per_rank} sequences"
        _require_divisor(f"{micro_batch}_for_update", micro_batch_size, per_rank, share)
        mini_batches = prompts_per_step // batch_size
        return cls(
            prompts_per_mini_batch=batch_size,
            sequences_per_mini_batch=batch_size * n,
            mini_batches=mini_batches,
            sequences_per_rank_per_mini_batch=per_rank,
            update_micro_batch_size=micro_batch_size,
            update_micro_batches=per_rank // micro_batch_size,
            experience_micro_batch_size=experience_size,
            optimizer_steps_per_step=mini_batches * model.ppo_epochs,
        )

    def rows_of_mini_batch(self, number: int, world_size: int) -> list[int]:
        """Row numbers of a mini-batch in the step's batch: the `number`-th part of every worker's rows."""
        size = self.sequences_per_rank_per_mini_batch
        starts = [(rank * self.mini_batches + number) * size for rank in range(world_size)]
        return [row for first in starts for row in range(first, first + size)]

    def describe(self, experience: str, update: str) -> list[str]:
        """Three lines for the log.

        Args:
            experience: name of the pass without gradient.
            update: name of the update.
        """
        passes = self.optimizer_steps_per_step // self.mini_batches
        return [
            f"{experience}: {self.experience_micro_batch_size} sequences at once on each worker",
            f"{update}: {self.mini_batches} mini-batches of {self.prompts_per_mini_batch} prompts = "
            f"{self.sequences_per_mini_batch} sequences; "
            f"ppo_epochs={passes}, so {self.optimizer_steps_per_step} optimizer steps",
            f"{update}, mini-batch on each worker: {self.sequences_per_rank_per_mini_batch} sequences = "
            f"{self.update_micro_batches} micro-batches x {self.update_micro_batch_size}",
        ]


@dataclass(frozen=True)
class BatchPlan:
    """The numbers of prompts and sequences at each stage of a training step."""

    world_size: int
    """Workers, W."""
    prompts_per_step: int
    """Prompts per training step."""
    responses_per_prompt: int
    """Responses per prompt, n."""
    sequences_per_step: int
    """Prompts times responses, N."""
    prompts_per_draw: int
    """Prompts drawn from the data and answered at once."""
    fewest_draws: int
    """Number of draws that fill a step if every group of responses is kept."""
    most_draws: int | None
    """Largest number of draws in a step; more than the fewest only with filtered groups. None for any number."""
    ranks_per_engine: int
    """Number of consecutive workers that share a rollout engine."""
    ranks_per_row: int
    """Number of workers that share each row in the policy's passes, `ulysses_size`."""
    ranks_per_critic_row: int
    """The same for the critic's passes."""
    actor: ModelPlan
    """The policy's batch sizes; the reference uses them too."""
    critic: ModelPlan | None
    """The critic's batch sizes; None without a critic."""

    @classmethod
    def from_config(cls, config: PPOConfig, world_size: int) -> BatchPlan:
        """Compute the plan for `world_size` workers.

        Raises:
            ValueError: a number is not divisible as required; the message has the calculation and the nearest values.
        """
        data, rollout, worker = config.data, config.worker.rollout, config.worker
        n = rollout.n
        prompts_per_draw = data.mini_rollout_batch_size or data.rollout_batch_size
        # With filtered groups, a draw may be larger than a step: how many of its prompts remain is not known.
        if data.rollout_batch_size % prompts_per_draw and not config.algorithm.online_filtering:
            raise ValueError(
                f"data.rollout_batch_size={data.rollout_batch_size} is not a multiple of "
                f"data.mini_rollout_batch_size={prompts_per_draw}, so generated responses would go unused; "
                f"use {_nearest_divisors(data.rollout_batch_size, prompts_per_draw)}"
            )

        fewest_draws = most_draws = ceil(data.rollout_batch_size / prompts_per_draw)
        if config.algorithm.online_filtering:
            most_draws = config.trainer.max_try_make_batch
            if most_draws <= 0:
                most_draws = None
            elif most_draws < fewest_draws:
                raise ValueError(
                    f"trainer.max_try_make_batch={most_draws} draws of {prompts_per_draw} prompts never make "
                    f"data.rollout_batch_size={data.rollout_batch_size}; use {fewest_draws} at the least, more for "
                    "what algorithm.online_filtering drops, or 0 for any number"
                )

        if config.algorithm.adv_estimator in COMPARING_ESTIMATORS and n < 2:
            raise ValueError(
                f"worker.rollout.n={n} leaves algorithm.adv_estimator={config.algorithm.adv_estimator} nothing to "
                "compare: it needs worker.rollout.n=2 or more"
            )
        sizes = (data.rollout_batch_size, n, world_size)
        actor = ModelPlan.from_config("worker.actor", worker.actor, *sizes)
        critic = None
        if config.algorithm.needs_critic:
            critic = ModelPlan.from_config("worker.critic", worker.critic, *sizes)
        ranks_per_engine = rollout.tensor_parallel_size if rollout.name == "vllm" else 1
        teams = {f"{key}.ulysses_size": model.ulysses_size for key, model in config.trained_models.items()}
        teams["worker.rollout.tensor_parallel_size"] = ranks_per_engine
        for key, size in teams.items():
            _require_multiple("trainer.nnodes x trainer.n_gpus_per_node", world_size, size, f"{key}={size}")
        sharded = config.trained_models | ({"worker.ref": worker.ref} if config.needs_reference_model else {})
        for name, model in sharded.items():
            size = model.fsdp.fsdp_size
            if 0 < size < world_size:
                _require_divisor(f"{name}.fsdp.fsdp_size", size, world_size, f"{world_size} workers")

        return cls(
            world_size=world_size,
            prompts_per_step=data.rollout_batch_size,
            responses_per_prompt=n,
            sequences_per_step=data.rollout_batch_size * n,
            prompts_per_draw=prompts_per_draw,
            fewest_draws=fewest_draws,
            most_draws=most_draws,
            ranks_per_engine=ranks_per_engine,
            ranks_per_row=worker.actor.ulysses_size,
            ranks_per_critic_row=worker.critic.ulysses_size,
            actor=actor,
            critic=critic,
        )

    @property
    def shares(self) -> dict[str, int]:
        """Number of neighbouring workers with the same rows, by what they share: an engine, or each row's tokens."""
        return {"engine": self.ranks_per_engine, "actor": self.ranks_per_row, "critic": self.ranks_per_critic_row}

    @property
    def num_balance_pieces(self) -> int:
        """Number of equal pieces of a step, such that every mini-batch of both models consists of whole pieces.

        Balancing moves rows only within a piece, so rows stay in their mini-batches, and optimizer steps do not depend
        on W. W divides the rows of a piece because it divides the rows of both models' mini-batches.
        """
        return lcm(*(model.mini_batches for model in (self.actor, self.critic) if model is not None))

    def describe(self) -> list[str]:
        """The plan for the log: two lines, and three for each trained model."""
        draws = f"{self.fewest_draws} x {self.prompts_per_draw} prompts"
        if self.most_draws is None:
            draws += ", and more until enough groups carry signal"
        elif self.most_draws > self.fewest_draws:
            draws += f", and up to {self.most_draws} x {self.prompts_per_draw} until enough groups carry signal"
        lines = [
            f"step: {self.prompts_per_step} prompts x {self.responses_per_prompt} responses = "
            f"{self.sequences_per_step} sequences on {self.world_size} workers",
            f"generation: {draws}",
            *self.actor.describe("log-probs", "update"),
        ]
        if self.critic is not None:
            lines += self.critic.describe("values", "critic update")
        return lines


def training_steps(config: PPOConfig, prompts_in_dataset: int) -> int:
    """Number of training steps of the run: `trainer.max_steps`, or the steps in `trainer.total_epochs` epochs.

    The last, incomplete draw of an epoch is left out. As in EasyR1, steps are counted as if every group of responses
    were kept; with filtered groups a step takes more prompts, and the run makes more passes over the data.

    Raises:
        ValueError: there are too few rows for a single step.
    """
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    prompts_per_draw = config.data.mini_rollout_batch_size or config.data.rollout_batch_size
    draws_per_epoch = prompts_in_dataset // prompts_per_draw
    steps_per_epoch = draws_per_epoch * prompts_per_draw // config.data.rollout_batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"data.train_files holds {prompts_in_dataset} usable prompts, fewer than one step of "
            f"data.rollout_batch_size={config.data.rollout_batch_size}; use a smaller batch or more data"
        )
    return steps_per_epoch * config.trainer.total_epochs


def _require_divisor(key: str, value: int, total: int, total_text: str) -> None:
    """Raise unless `total` is a multiple of `value`; the message names the nearest divisors of `total`.

    It suggests no other total, since other rules also depend on the total.
    """
    if total % value:
        raise ValueError(f"{key}={value} does not divide {total_text}; use {_nearest_divisors(total, value)}")


def _nearest_divisors(total: int, wanted: int) -> str:
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    nearest = sorted(divisors, key=lambda size: abs(size - wanted))[:2]
    return " or ".join(str(size) for size in sorted(nearest))


def _require_multiple(key: str, value: int, divisor: int, divisor_text: str, responses_per_prompt: int = 1) -> None:
    """Raise unless `value` x `responses_per_prompt` is a multiple of `divisor`; the message has the nearest values."""
    total = value * responses_per_prompt
    if total % divisor == 0:
        return
    step = divisor // gcd(divisor, responses_per_prompt)
    below = value // step * step
    use = f"{below} or {below + step}" if below else f"{below + step}"
    product = f" x worker.rollout.n={responses_per_prompt} = {total} sequences" if responses_per_prompt > 1 else ""
    raise ValueError(f"{key}={value}{product} is not a multiple of {divisor_text}; use {use}")
