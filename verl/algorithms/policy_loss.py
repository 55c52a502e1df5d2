# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient losses per token. Averaging, token weights and micro-batches are the caller's.

N sequences, R response length. A loss is a function in `POLICY_LOSSES`, found by `worker.actor.loss_type`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond any clip range, and far from overflow in float32

POLICY_LOSSES: dict[str, Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]] = {}


def register_policy_loss(name: str) -> Callable[[Callable], Callable]:
    """Decorator that makes a loss with the signature of `clipped_policy_loss` known under `name`.

    Raises ValueError when the name is taken.
    """

    def register(function: Callable) -> Callable:
        if name in POLICY_LOSSES:
            raise ValueError(f"policy loss '{name}' is already {POLICY_LOSSES[name].__qualname__}; use another name")
        POLICY_LOSSES[name] = function
        return function

    return register


@register_policy_loss("default")
def clipped_policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate per token, as a loss to minimise.

    With ratio r = exp(log_probs - old_log_probs) and advantage A, PPO (arXiv 1707.06347, eq. 7):
    max(-A r, -A clip(r, 1 - low, 1 + high)). Our deltas:

    1. The upper and the lower bound are two numbers (DAPO's clip-higher, arXiv 2503.14476, sec. 3.1).
    2. Where A < 0 the loss is at most -A * dual, so that a token whose ratio has exploded has no gradient (dual clip,
       arXiv 1912.09729, eq. 5).
    3. The log-ratio is clamped to +-20 before the exponential, for finite values.

    log_probs, old_log_probs, advantages: (N, R). Only `log_probs` carries a gradient.

    Returns the loss (N, R), not masked, and metrics (N, R) without gradient, to be averaged over the real tokens:
    `pg_clipfrac_higher` (1 where the clipped ratio decides), `pg_clipfrac_lower` (1 where the dual clip decides),
    `ppo_kl` (old - new log-probability, a one-sample estimate of the KL to the policy that made the rollout).
    """
    log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (N, R)
    ratio = log_ratio.exp()
    loss_plain = -advantages * ratio
    loss_clipped = -advantages * ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    loss_bound = -advantages * clip_ratio_dual

    loss_ppo = torch.maximum(loss_plain, loss_clipped)
    negative = advantages < 0
    per_token_loss = torch.where(negative, torch.minimum(loss_ppo, loss_bound), loss_ppo)

    per_token_metrics = {
        "pg_clipfrac_higher": (loss_clipped > loss_plain).float(),
        "pg_clipfrac_lower": (negative & (loss_ppo > loss_bound)).float(),
        "ppo_kl": -log_ratio.detach(),
    }
    return per_token_loss, per_token_metrics
