# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators: from rewards per token to how much better each token was than expected.

N sequences, R response length. An estimator is a function in `ADVANTAGE_ESTIMATORS`, found by
`algorithm.adv_estimator`: it takes one `AdvantageInputs` and returns (advantages, returns), both (N, R) and 0 outside
the response. Rows may stand in any order; groups are found by `uid`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from verl.algorithms.registry import Registry
from verl.trainer.config import AlgorithmConfig
from verl.utils.masked_ops import masked_whiten


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator may read: the rewards of a step's batch, and what they are compared with."""

    token_level_rewards: torch.Tensor
    """(N, R): a response's reward is the sum over R; 0 outside the response."""
    response_mask: torch.Tensor
    """(N, R): 1 on response tokens."""
    uid: np.ndarray
    """(N,) objects, equal for responses to the same prompt."""
    config: AlgorithmConfig
    """The section `algorithm`: the settings of every estimator."""
    scores: torch.Tensor | None = None
    """(N,): each response's reward before a KL penalty was subtracted; None if none was."""
    values: torch.Tensor | None = None
    """(N, R): a critic's estimate, before each token, of the discounted rewards from that token on; for `gae` only."""
    reward_baselines: torch.Tensor | None = None
    """(N,): the score of the greedy response to the row's prompt; for `remax` only."""


Estimator = Callable[[AdvantageInputs], tuple[torch.Tensor, torch.Tensor]]

ADVANTAGE_ESTIMATORS: Registry[Estimator] = Registry("advantage estimator", "algorithm.adv_estimator")
register_adv_estimator = ADVANTAGE_ESTIMATORS.register


@register_adv_estimator("grpo")
def compute_grpo_advantages(inputs: AdvantageInputs, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Group-relative advantages: a response's reward against the other responses to its prompt.

    (reward - group mean) / (group std + eps), the same on each token of a response; GRPO (DeepSeekMath, arXiv
    2402.03300, sec. 4.1.2). Our deltas:

    1. The standard deviation is the unbiased one (n - 1), and eps keeps it from zero.
    2. A group of one, or whose scores are all equal, has nothing to compare: advantage exactly 0. If a KL penalty
       was subtracted, this is decided by the scores before it. Otherwise a group that differs in its KL alone would be
       divided by a tiny deviation, and count as much as a group with right and wrong answers.

    Returns the same for advantages and returns.
    """

    def compare(rewards: torch.Tensor) -> torch.Tensor:
        return (rewards - rewards.mean()) / (rewards.std() + eps)

    return _compare_responses(inputs, compare, _scores_of(inputs))


@register_adv_estimator("grpo_passk")
def compute_grpo_passk_advantages(inputs: AdvantageInputs, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages for the best of a prompt's responses: what the group would lose without it.

    The maximum of the group's rewards less the maximum without this response (pass@k as an objective, arXiv
    2503.19595, its leave-one-out baseline). That is best - second best for the best response and 0 for the others;
    if two responses share the best reward, both have advantage 0. Our deltas:

    1. Divided by the group's std + eps, as in GRPO.
    2. A group of one, or whose scores are all equal, has advantage exactly 0, as in `grpo`.

    Returns the same for advantages and returns.
    """

    def compare(rewards: torch.Tensor) -> torch.Tensor:
        best, second = rewards.topk(2).values
        return torch.where(rewards == best, (best - second) / (rewards.std() + eps), 0)

    return _compare_responses(inputs, compare, _scores_of(inputs))


@register_adv_estimator("rloo")
def compute_rloo_advantages(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward less the mean reward of the *other* responses to the prompt, the same on each token of a response.

    REINFORCE leave-one-out (RLOO; Ahmadian et al., arXiv 2402.14740, the estimator of that name). Our delta:

    1. A group of one, or whose rewards are all equal, has advantage exactly 0.

    Returns the same for advantages and returns.
    """

    def compare(rewards: torch.Tensor) -> torch.Tensor:
        return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)

    return _compare_responses(inputs, compare, inputs.token_level_rewards.sum(-1))


@register_adv_estimator("reinforce_plus_plus")
def compute_reinforce_plus_plus_advantages(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Discounted rewards from each token on, normalised over the whole batch instead of per prompt.

    REINFORCE++ (arXiv 2501.03262, its global advantage normalisation). Our deltas:

    1. Normalised as `masked_whiten` does: over all response tokens, by the unbiased variance plus 1e-8. A batch whose
       tokens all have the same return, or whose responses all have the same score, has advantage exactly 0.
    2. The KL is part of the rewards where the configuration puts it there, not always.

    Returns the whitened returns as advantages, and the returns themselves.
    """
    no_values = torch.zeros_like(inputs.token_level_rewards)  # (N, R)
    gamma = inputs.config.gamma
    to_go = _discounted_errors(inputs.token_level_rewards, no_values, inputs.response_mask, gamma, lam=1.0)
    scores = _scores_of(inputs)
    if inputs.scores is not None and (scores == scores[0]).all():
        return torch.zeros_like(to_go), to_go  # they differ in KL alone, which whitening would magnify
    return masked_whiten(to_go, inputs.response_mask), to_go


@register_adv_estimator("remax")
def compute_remax_advantages(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward less the reward of the greedy response to the prompt, the same on each token of a response.

    ReMax (arXiv 2310.10505, Algorithm 1). Our delta:

    1. The baseline is the greedy response's score alone, also where a KL penalty is part of the sampled response's
       reward.

    Needs `reward_baselines`. Returns the same for advantages and returns.
    """
    assert inputs.reward_baselines is not None, "remax without the greedy responses' scores"
    return _on_every_token(inputs.token_level_rewards.sum(-1) - inputs.reward_baselines, inputs)


@register_adv_estimator("gae")
def compute_gae_advantages(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation from a critic's values.

    With the critic's error d_t = r_t + gamma V_{t+1} - V_t, where V after a response's last token is 0,
    A_t = sum over l of (gamma lam)^l d_{t+l} (arXiv 1506.02438, "Advantage Function Estimation"). Our deltas:

    1. Tokens outside the response mask are skipped: the tokens before and after them are neighbours.
    2. Advantages are whitened by `masked_whiten` over all response tokens of the batch. The returns that the critic
       learns, A_t + V_t, are taken before that.

    Needs `values`. Returns the whitened advantages, and the returns.
    """
    assert inputs.values is not None, "gae without a critic's values"
    values = torch.where(inputs.response_mask != 0, inputs.values, 0)  # (N, R)
    advantages = _discounted_errors(
        inputs.token_level_rewards, values, inputs.response_mask, inputs.config.gamma, inputs.config.lam
    )  # (N, R)
    return masked_whiten(advantages, inputs.response_mask), advantages + values


def _scores_of(inputs: AdvantageInputs) -> torch.Tensor:
    return inputs.token_level_rewards.sum(-1) if inputs.scores is None else inputs.scores  # (N,)


def _compare_responses(
    inputs: AdvantageInputs, compare: Callable[[torch.Tensor], torch.Tensor], deciding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages from `compare`, which maps the rewards (n,) of one prompt's responses to their advantages (n,).

    A group of one, or with equal `deciding` values (N,), is not compared but gets 0.
    """
    rewards = inputs.token_level_rewards.sum(-1)  # (N,)
    advantages = torch.zeros_like(rewards)  # (N,)
    _, group_of_row = np.unique(inputs.uid.astype(str), return_inverse=True)
    for group in range(group_of_row.max() + 1):
        rows = torch.from_numpy(np.flatnonzero(group_of_row == group)).to(rewards.device)
        # An eps would not do: it divides the rounding error in the mean of equal rewards by eps.
        if (deciding[rows] != deciding[rows[0]]).any():
            advantages[rows] = compare(rewards[rows])
    return _on_every_token(advantages, inputs)


def _on_every_token(advantages: torch.Tensor, inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    spread = advantages.unsqueeze(-1) * inputs.response_mask  # (N, R)
    return spread, spread


def _discounted_errors(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """(N, R): the sum over the tokens from t on of (gamma lam)^l (r + gamma V_next - V), tokens off the mask skipped.

    Where all values are 0 and lam is 1 these are the discounted rewards to go.
    """
    is_real = mask != 0
    sums = torch.zeros_like(rewards)  # (N, R)
    running = next_value = torch.zeros_like(rewards[:, 0])  # (N,)
    for t in reversed(range(rewards.shape[1])):
        error = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(is_real[:, t], error + gamma * lam * running, running)
        next_value = torch.where(is_real[:, t], values[:, t], next_value)
        sums[:, t] = running
    return torch.where(is_real, sums, 0)
