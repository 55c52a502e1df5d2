# SPDX-License-Identifier: Apache-2.0
"""Token signals as a user writes them: the names of their arguments say what they need."""

import torch


def surprise(old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
    """How unlikely the token was, for trainer and engine alike."""
    return -scale * (old_log_probs + rollout_log_probs)


def attends(attention_mass: torch.Tensor) -> torch.Tensor:
    """The share of the attention to the prompt that falls on images."""
    return attention_mass[..., 1]
