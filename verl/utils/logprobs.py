# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens from a model's logits, in float32, without a float32 copy of all the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint


def log_probs_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    suppressed_token_ids: Sequence[int] = (),
) -> torch.Tensor:
    """Log-probability of each label under the distribution that the sampler drew from.

    logits: (N, R, V), any floating type. Position t predicts label t.
    labels: (N, R) int64. A suppressed id as label gets about -3.4e38.
    temperature: the sampler's; logits are divided by it.
    suppressed_token_ids: ids the sampler never draws; they take no share of the probability here either.

    Returns (N, R) float32, differentiable in `logits`. One row is upcast at a time, and again in the backward pass:
    at V = 152k the float32 logits of a whole batch would be the largest tensor of a training step.
    """
    suppressed = torch.tensor(list(suppressed_token_ids), dtype=torch.int64, device=logits.device)
    rows = []
    for row_logits, row_labels in zip(logits.unbind(0), labels.unbind(0), strict=True):
        arguments = (row_logits, row_labels, temperature, suppressed)
        if torch.is_grad_enabled() and logits.requires_grad:
            rows.append(checkpoint(_row_log_probs, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            rows.append(_row_log_probs(*arguments))
    return torch.stack(rows)  # (N, R)


def _row_log_probs(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, suppressed: torch.Tensor
) -> torch.Tensor:
    scaled = logits.float() / temperature  # (R, V)
    scaled = scaled.index_fill_(-1, suppressed, torch.finfo(torch.float32).min)
    chosen = scaled.gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # (R,)
    return chosen - scaled.logsumexp(-1)
