# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators: from rewards per token to how much better each token was than expected.

N sequences, R response length. An estimator is a function in `ADVANTAGE_ESTIMATORS`, found by
`algorithm.adv_estimator`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

ADVANTAGE_ESTIMATORS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {}


def register_adv_estimator(name: str) -> Callable[[Callable], Callable]:
    """Decorator that makes an estimator with the signature of `compute_grpo_advantages` known under `name`.

    Raises ValueError when the name is taken.
    """

    def register(function: Callable) -> Callable:
        if name in ADVANTAGE_ESTIMATORS:
            taken_by = ADVANTAGE_ESTIMATORS[name].__qualname__
            raise ValueError(f"advantage estimator '{name}' is already {taken_by}; use another name")
        ADVANTAGE_ESTIMATORS[name] = function
        return function

    return register


@register_adv_estimator("grpo")
def compute_grpo_advantages(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, uid: np.ndarray, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group-relative advantages: a response's reward against the other responses to its prompt.

    (reward - group mean) / (group std + eps), the same on each token of a response; GRPO (DeepSeekMath, arXiv
    2402.03300, sec. 4.1.2). Our deltas:

    1. The standard deviation is the unbiased one (n - 1), and eps keeps it from zero.
    2. A group of one, or whose rewards are all equal, has nothing to compare: advantage exactly 0.

    token_level_rewards: (N, R), summed over R for a response's reward; 0 outside the response.
    response_mask: (N, R).
    uid: N objects, equal for responses to the same prompt. Rows may stand in any order.

    Returns (advantages, returns), both (N, R) and here the same; 0 outside the response.
    """
    rewards = token_level_rewards.sum(-1)  # (N,)
    advantages = torch.zeros_like(rewards)  # (N,)
    _, group_of_row = np.unique(uid.astype(str), return_inverse=True)
    for group in range(group_of_row.max() + 1):
        rows = torch.from_numpy(np.flatnonzero(group_of_row == group)).to(rewards.device)
        group_rewards = rewards[rows]
        # Compared, not left to eps: rounding in the mean of equal rewards would be blown up by 1 / eps.
        if (group_rewards == group_rewards[0]).all():
            continue
        advantages[rows] = (group_rewards - group_rewards.mean()) / (group_rewards.std() + eps)

    advantages = advantages.unsqueeze(-1) * response_mask  # (N, R)
    return advantages, advantages
