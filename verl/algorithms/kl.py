# SPDX-License-Identifier: Apache-2.0
"""KL divergence from a reference policy: estimates from sampled tokens, the penalty in the reward, its coefficient.

N sequences, R response length. `kl_penalty: full` is no estimate: it needs both models' logits, and
`verl.utils.logprobs.token_statistics` takes it from them.
"""

from __future__ import annotations

import torch

from verl.utils.masked_ops import masked_mean

KL_PENALTIES = ("kl", "abs", "mse", "low_var_kl")


def compute_kl(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, kl_penalty: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference), differentiable in `log_probs`.

    With d = log_probs - ref_log_probs (J. Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html):

    - `kl`: d (k1; unbiased, can be negative)
    - `abs`: |d|
    - `mse`: d^2 / 2 (k2; its gradient is an unbiased one of the KL)
    - `low_var_kl`: exp(-d) - 1 + d (k3; unbiased, never negative)

    Our delta: `low_var_kl` clamps d to +-20 before and the result to +-10 after, so that a single token that
    the reference finds impossible cannot dominate the loss; such a token has no gradient.

    log_probs, ref_log_probs: (N, R). Returns (N, R), not masked. Raises ValueError for an unknown name.
    """
    difference = log_probs - ref_log_probs
    if kl_penalty == "kl":
        return difference

    if kl_penalty == "abs":
        return difference.abs()

    if kl_penalty == "mse":
        return 0.5 * difference.square()

    if kl_penalty == "low_var_kl":
        log_ratio = (-difference).clamp(-20.0, 20.0)
        return (log_ratio.exp() - 1.0 - log_ratio).clamp(-10.0, 10.0)

    raise ValueError(f"kl_penalty='{kl_penalty}' is not known; use one of {', '.join(KL_PENALTIES)}")


def apply_kl_penalty(
    token_level_scores: torch.Tensor, kl: torch.Tensor, response_mask: torch.Tensor, kl_coef: float
) -> tuple[torch.Tensor, float]:
    """Subtract the KL from the reward, token by token (RLHF; arXiv 1909.08593, "Methods").

    token_level_scores, kl, response_mask: (N, R); `kl` from `compute_kl` on the old log-probs.

    Returns token_level_rewards (N, R) = scores - kl_coef * kl on response tokens, and the mean KL: over rows, of each
    row's mean over its response tokens.
    """
    penalty = torch.where(response_mask != 0, kl_coef * kl, 0)  # (N, R)
    return token_level_scores - penalty, masked_mean(kl, response_mask, dim=-1).mean().item()


def adapt_kl_coef(kl_coef: float, mean_kl: float, num_sequences: int, kl_target: float, kl_horizon: float) -> float:
    """The coefficient of the next step: it moves so that the mean KL approaches the target.

    With the error e = clip(mean_kl / kl_target - 1, -0.2, 0.2), kl_coef (1 + e num_sequences / kl_horizon) (arXiv
    1909.08593, sec. 2.2). Our deltas:

    1. The gain is num_sequences / kl_horizon instead of a constant 0.1, so that it does not depend on the batch size.
    2. `mean_kl` is per token, as `apply_kl_penalty` returns it, not per sequence; so is the target.
    """
    error = min(max(mean_kl / kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_sequences / kl_horizon)
