# SPDX-License-Identifier: Apache-2.0
"""The critic's loss per token. Averaging and micro-batches are the caller's. N sequences, R response length."""

from __future__ import annotations

import torch

from verl.workers.critic.config import CriticConfig


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, config: CriticConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Squared error of the values, clipped so that moving far from the old values gains nothing.

    max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2 with the return G: the squared error of PPO (arXiv
    1707.06347, "Algorithm") with the clipping of its authors' code, which the paper leaves out (arXiv 2005.12729). A
    value that has moved more than c towards its return has no gradient; a value that moved away keeps its
    gradient. Our deltas:

    1. Half of the square, so that the gradient is the error itself.
    2. c is in units of the value, and independent of the policy's clip range.

    values, old_values, returns: (N, R). Only `values` carries a gradient.
    config: the critic's section; c is its `cliprange_value`.

    Returns the loss (N, R), not masked, and metrics (N, R) without gradient, to be averaged over the real tokens:
    `vf_clipfrac` (1 where the clipped value decides), `vpred_mean` (the values).
    """
    reach = config.cliprange_value
    clipped_values = values.clamp(old_values - reach, old_values + reach)  # (N, R)
    loss_plain = (values - returns).square()
    loss_clipped = (clipped_values - returns).square()
    per_token_metrics = {"vf_clipfrac": (loss_clipped > loss_plain).float(), "vpred_mean": values.detach()}
    return 0.5 * torch.maximum(loss_plain, loss_clipped), per_token_metrics
