# SPDX-License-Identifier: Apache-2.0
"""A token signal as a user writes one: the names of its arguments say what it needs."""

import torch


def surprise(old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
    """How unlikely the token was, for trainer and engine alike."""
    return -scale * (old_log_probs + rollout_log_probs)
