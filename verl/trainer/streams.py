# SPDX-License-Identifier: Apache-2.0
"""The streams of a training step's batch, in one table: type and shape, the phase that adds each, and its readers.

A stream is on the batch in every step of a run, or in none. The configuration decides this, so no phase has to check
for a stream. Phases are the methods of `RayDAPOTrainer` that `fit` calls, here without their underscore. The trainer
uses this table to select what it sends to the workers; a test compares the rest of it with what the phases do. A
smaller table lists the streams of prompts before they are answered.

Shapes: B prompts, N rows, P prompt length, R response length, S = P + R. `position_ids` are (N, 4, S), or (B, 4, P),
under multimodal rope.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from verl.algorithms.token_weights import measured_streams, signals_of
from verl.trainer.config import PPOConfig

Condition = Callable[[PPOConfig], bool]
Reader = str | tuple[str, Condition]
"""A phase, or a phase and the runs in which it reads the stream."""


@dataclass(frozen=True)
class Stream:
    """One tensor, or one column of Python objects, of the batch."""

    name: str
    shape: str
    """Its dimensions, such as `N R 2`."""
    dtype: torch.dtype | type
    """`object` for a column of objects."""
    writer: str
    """The phase that adds it."""
    readers: tuple[Reader, ...]
    """Later phases that read it, in the runs that have these phases (see `PHASES`)."""
    present: Condition
    """The runs that have it. A name may have several rows; at most one of them applies to a run."""

    def is_read_by(self, phase: str, config: PPOConfig) -> bool:
        """Whether a phase reads the stream in this run."""
        readers = [(reader, always) if isinstance(reader, str) else reader for reader in self.readers]
        return any(name == phase and condition(config) for name, condition in readers)


def always(config: PPOConfig) -> bool:
    """Every run."""
    return True


def filters(config: PPOConfig) -> bool:
    """Groups are filtered by their scores, so responses are scored as soon as they are drawn."""
    return config.algorithm.online_filtering


def scores_later(config: PPOConfig) -> bool:
    """Responses are scored after all are drawn."""
    return not config.algorithm.online_filtering


def scores_beside(config: PPOConfig) -> bool:
    """Responses are scored in parallel with the log-prob passes."""
    return scores_later(config) and not config.worker.reward.streams


def scores_measured(config: PPOConfig) -> bool:
    """The reward function needs streams of the log-prob pass, and runs after it."""
    return scores_later(config) and bool(config.worker.reward.streams)


def scores_batch_beside(config: PPOConfig) -> bool:
    """The reward function takes the whole batch, in parallel with the log-prob passes."""
    return scores_beside(config) and config.worker.reward.takes_batch


def takes_raw_ids(config: PPOConfig) -> bool:
    """The rollout engine expands image placeholders itself."""
    return config.worker.rollout.name == "vllm"


def baselines(config: PPOConfig) -> bool:
    """Rewards are compared with the score of a greedy response."""
    return config.algorithm.needs_baselines


def critic(config: PPOConfig) -> bool:
    """Rewards are compared with the values of a critic."""
    return config.algorithm.needs_critic


def estimates_kl(config: PPOConfig) -> bool:
    """The KL is estimated from sampled tokens."""
    return config.algorithm.estimates_kl


def estimates_kl_in_reward(config: PPOConfig) -> bool:
    """The KL is estimated from sampled tokens and subtracted from the reward."""
    return config.algorithm.estimates_kl and config.algorithm.kl_in_reward


def estimates_kl_in_loss(config: PPOConfig) -> bool:
    """The KL is estimated from sampled tokens and part of the loss."""
    return config.algorithm.estimates_kl and config.algorithm.kl_in_loss


def full_kl_in_reward(config: PPOConfig) -> bool:
    """The KL over the whole vocabulary is subtracted from the reward."""
    return config.algorithm.full_kl_in_reward


def importance(config: PPOConfig) -> bool:
    """Importance weights correct for different probabilities in rollout engine and trainer."""
    return config.worker.rollout.importance_cap is not None


def attention(config: PPOConfig) -> bool:
    """Attention is measured."""
    return config.worker.rollout.collect_attentions


def maps_samples(config: PPOConfig) -> bool:
    """A report shows a few responses token by token."""
    return config.trainer.report and config.worker.rollout.collect_attentions


def logs_training_samples(config: PPOConfig) -> bool:
    """A few responses of training are shown."""
    return config.trainer.train_generations_to_log > 0


def token_weights(config: PPOConfig) -> bool:
    """The actor's loss is weighted token by token."""
    return config.algorithm.enable_token_weights


def signals(config: PPOConfig) -> bool:
    """There are token signals, to weigh by or to log."""
    return config.algorithm.enable_token_weights or bool(config.algorithm.token_signals_to_log)


def actor_shares_prompts(config: PPOConfig) -> bool:
    """The policy computes each prompt once for all its responses."""
    return config.worker.actor.shares_prompts


def critic_shares_prompts(config: PPOConfig) -> bool:
    """The critic does."""
    return config.algorithm.needs_critic and config.worker.critic.shares_prompts


def shares_prompts(config: PPOConfig) -> bool:
    """One of them does."""
    return actor_shares_prompts(config) or critic_shares_prompts(config)


def measures(name: str) -> Condition:
    """The log-prob pass measures the stream `name`, for a signal or because attention is collected."""
    return lambda config: name in measured_streams(config.algorithm, attention(config))


def asks_for(name: str) -> Condition:
    """A token signal of the run asks for the stream `name`."""
    return lambda config: any(name in signal.streams for signal in signals_of(config.algorithm).values())


def reward_asks_for(name: str) -> Condition:
    """The reward function asks for the stream `name`."""
    return lambda config: name in config.worker.reward.streams


def weighs_or_asks_for(name: str) -> Condition:
    """Tokens are weighted, or a token signal asks for the stream `name`."""
    return lambda config: token_weights(config) or asks_for(name)(config)


PHASES: dict[str, Condition] = {
    "rollout": always,
    "balance_across_ranks": always,
    "start_rewards": scores_beside,
    "choose_samples": maps_samples,
    "compute_log_probs": always,
    "compare_with_rollout": always,
    "compute_values": critic,
    "await_rewards": scores_later,
    "attach_token_weights": signals,
    "compute_advantages": always,
    "update_critic": critic,
    "update_actor": always,
    "watch_progress": always,
    "log_samples": logs_training_samples,
    "log": always,
}
"""The phases of a step that use the batch, in order, and the runs that have them."""

_ACTOR_PASSES, _CRITIC_PASSES = ("compute_log_probs", "update_actor"), ("compute_values", "update_critic")
_PASSES = (*_ACTOR_PASSES, *_CRITIC_PASSES)
_INT, _FLOAT = torch.int64, torch.float32
_WEIGHTS = "attach_token_weights"

_SCORES = ("start_rewards", ("await_rewards", scores_measured))
_SCORE_READERS = ("compute_advantages", "log_samples", "log")
_SCORES_BATCH = (("start_rewards", scores_batch_beside), ("await_rewards", scores_measured))

# fmt: off
STREAMS = (
    Stream("prompts", "N P", _INT, "rollout", _SCORES_BATCH, always),
    Stream("responses", "N R", _INT, "rollout", (
        *_SCORES, (_WEIGHTS, weighs_or_asks_for("responses")), "log_samples", ("log", token_weights)), always),
    Stream("input_ids", "N S", _INT, "rollout", (*_PASSES, *_SCORES_BATCH), always),
    Stream("attention_mask", "N S", _INT, "rollout", (
        "balance_across_ranks", *_PASSES, *_SCORES_BATCH, "log"), always),
    Stream("position_ids", "N S", _INT, "rollout", (*_PASSES, *_SCORES_BATCH), always),
    Stream("response_mask", "N R", _INT, "rollout", (
        ("balance_across_ranks", shares_prompts), "start_rewards", *_PASSES, "compare_with_rollout", "await_rewards",
        _WEIGHTS, "compute_advantages", "watch_progress", "log_samples", "log"), always),
    Stream("rollout_log_probs", "N R", _FLOAT, "rollout", (
        "compare_with_rollout", (_WEIGHTS, asks_for("rollout_log_probs"))), always),
    Stream("multi_modal_data", "N", object, "rollout", (*_SCORES, *_PASSES, ("log_samples", maps_samples)), always),
    Stream("image_grid_thw", "N", object, "rollout", _SCORES_BATCH, always),
    Stream("uid", "N", object, "rollout", (
        *_SCORES, "choose_samples", ("balance_across_ranks", shares_prompts),
        *((phase, actor_shares_prompts) for phase in _ACTOR_PASSES),
        *((phase, critic_shares_prompts) for phase in _CRITIC_PASSES),
        "compute_advantages", "watch_progress", "log_samples", ("log", token_weights)), always),
    Stream("prompt_text", "N", object, "rollout", (*_SCORES, "watch_progress", "log_samples"), always),
    Stream("ground_truth", "N", object, "rollout", (*_SCORES, "log_samples"), always),
    Stream("extra", "N", object, "rollout", _SCORES, always),
    Stream("raw_prompt_ids", "N", object, "rollout", (), always),
    Stream("token_level_scores", "N R", _FLOAT, "rollout", _SCORE_READERS, filters),
    Stream("reward_results", "N", object, "rollout", ((_WEIGHTS, token_weights),), filters),
    Stream("reward_baselines", "N", _FLOAT, "rollout", ("compute_advantages",), baselines),
    Stream("is_mapped", "N", torch.bool, "choose_samples", ("compute_log_probs",), maps_samples),
    Stream("old_log_probs", "N R", _FLOAT, "compute_log_probs", (
        "compare_with_rollout", (_WEIGHTS, asks_for("old_log_probs")),
        ("compute_advantages", estimates_kl_in_reward), "update_actor"), always),
    Stream("ref_log_probs", "N R", _FLOAT, "compute_log_probs", (
        ("compute_advantages", estimates_kl_in_reward), ("update_actor", estimates_kl_in_loss)), estimates_kl),
    Stream("ref_kl", "N R", _FLOAT, "compute_log_probs", ("compute_advantages",), full_kl_in_reward),
    Stream("entropy", "N R", _FLOAT, "compute_log_probs", (_WEIGHTS,), measures("entropy")),
    Stream("image_kl", "N R", _FLOAT, "compute_log_probs", (_WEIGHTS,), measures("image_kl")),
    Stream("hidden_cosine", "N R", _FLOAT, "compute_log_probs", (_WEIGHTS,), measures("hidden_cosine")),
    Stream("attention_mass", "N R 2", _FLOAT, "compute_log_probs", (
        ("await_rewards", reward_asks_for("attention_mass")), (_WEIGHTS, asks_for("attention_mass")),
        ("log_samples", maps_samples)),
        measures("attention_mass")),
    Stream("attention_keys", "N 2", _INT, "compute_log_probs", (
        ("await_rewards", reward_asks_for("attention_keys")), (_WEIGHTS, asks_for("attention_keys")),
        ("log_samples", maps_samples)),
        measures("attention_keys")),
    Stream("attention_maps", "N", object, "compute_log_probs", ("log_samples",), maps_samples),
    Stream("importance_weights", "N R", _FLOAT, "compare_with_rollout", ("update_actor",), importance),
    Stream("values", "N R", _FLOAT, "compute_values", ("compute_advantages", "update_critic", "log"), critic),
    Stream("token_level_scores", "N R", _FLOAT, "await_rewards", _SCORE_READERS, scores_later),
    Stream("reward_results", "N", object, "await_rewards", ((_WEIGHTS, token_weights),), scores_later),
    Stream("token_weights", "N R", _FLOAT, _WEIGHTS, (
        "update_actor", ("log_samples", maps_samples), "log"), token_weights),
    Stream("token_level_rewards", "N R", _FLOAT, "compute_advantages", ("log",), always),
    Stream("advantages", "N R", _FLOAT, "compute_advantages", (
        "update_actor", "watch_progress", ("log_samples", maps_samples), "log"), always),
    Stream("returns", "N R", _FLOAT, "compute_advantages", ("update_critic", "log"), always),
)
# fmt: on
"""In the order in which a step adds the streams."""

PROMPT_STREAMS = (
    Stream("input_ids", "B P", _INT, "draw", ("generate",), always),
    Stream("attention_mask", "B P", _INT, "draw", ("generate",), always),
    Stream("position_ids", "B P", _INT, "draw", ("generate",), always),
    Stream("raw_prompt_ids", "B", object, "draw", (("generate", takes_raw_ids), "repeat"), always),
    Stream("multi_modal_data", "B", object, "draw", ("generate", "repeat"), always),
    Stream("image_grid_thw", "B", object, "draw", ("repeat",), always),
    Stream("uid", "B", object, "draw", ("repeat",), always),
    Stream("prompt_text", "B", object, "draw", ("repeat",), always),
    Stream("ground_truth", "B", object, "draw", ("repeat",), always),
    Stream("extra", "B", object, "draw", ("repeat",), always),
)
"""Streams of drawn prompts, in the phase `rollout`: workers read some to `generate`, others `repeat` per response."""


def streams_of(config: PPOConfig) -> list[Stream]:
    """The streams that the run's batches have."""
    return [stream for stream in STREAMS if stream.present(config)]


def streams_read_by(phase: str, config: PPOConfig) -> tuple[list[str], list[str]]:
    """Names of the tensors and of the object columns that a phase reads in this run."""
    if not PHASES[phase](config):
        return [], []
    return _names_of([stream for stream in streams_of(config) if stream.is_read_by(phase, config)])


def prompt_streams_read_by(step: str, config: PPOConfig) -> tuple[list[str], list[str]]:
    """The same for drawn prompts; `step` is `generate` or `repeat`."""
    return _names_of([stream for stream in PROMPT_STREAMS if stream.is_read_by(step, config)])


def _names_of(read: list[Stream]) -> tuple[list[str], list[str]]:
    return (
        [stream.name for stream in read if stream.dtype is not object],
        [stream.name for stream in read if stream.dtype is object],
    )
