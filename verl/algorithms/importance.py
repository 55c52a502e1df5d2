# SPDX-License-Identifier: Apache-2.0
"""Corrects for the difference between the rollout engine's probabilities and the trainer's.

N sequences, R response length.
"""

from __future__ import annotations

import torch


def truncated_importance_weights(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """min(old policy / rollout policy, cap) for every token: (N, R) float32, 0 outside the responses.

    A loss over tokens that the engine drew, each multiplied by the ratio, has the expectation of a loss over tokens
    drawn from the trainer's policy. The cap bounds the variance, and adds a bias.

    old_log_probs: (N, R), of the trainer before its update. rollout_log_probs: (N, R), of the engine, for the
        distribution it drew from. response_mask: (N, R).
    cap: above 0, the largest weight.

    Source: Ionides, "Truncated Importance Sampling" (2008); as the V-trace weight rho in Espeholt et al.,
    arXiv 1802.01561, section 4.1; between rollout engine and trainer in Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training" (2025). Deltas: 1. One ratio per token, none per sequence. 2. No
    gradient flows through the ratio.
    """
    log_ratio = (old_log_probs - rollout_log_probs).detach().float()  # (N, R)
    return log_ratio.exp().clamp(max=cap).masked_fill(response_mask == 0, 0.0)
