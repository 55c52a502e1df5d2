# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens from a model's logits, in float32, without a float32 copy of all the logits.

N sequences, R response length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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

    Returns (N, R) float32, differentiable once in `logits`. One row is upcast at a time, forward and backward: at
    V = 152k the float32 logits of a whole batch, and their softmax, would be the largest tensors of a training step.
    """
    suppressed = torch.tensor(list(suppressed_token_ids), dtype=torch.int64, device=logits.device)
    return _LabelLogProbs.apply(logits, labels, temperature, suppressed)


class _LabelLogProbs(torch.autograd.Function):
    """Keeps the logits as they came and one number a token; the softmax is made again, row by row, when asked for."""

    @staticmethod
    def forward(ctx, logits, labels, temperature, suppressed):
        log_probs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)  # (N, R)
        log_normalizers = torch.empty_like(log_probs)  # (N, R)
        for row, row_labels in enumerate(labels):
            scaled = _scale(logits[row], temperature, suppressed)  # (R, V)
            log_normalizers[row] = scaled.logsumexp(-1)
            log_probs[row] = scaled.gather(-1, row_labels.unsqueeze(-1)).squeeze(-1) - log_normalizers[row]

        ctx.save_for_backward(logits, labels, log_normalizers, suppressed)
        ctx.temperature = temperature
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, labels, log_normalizers, suppressed = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)  # (N, R, V)
        for row, row_labels in enumerate(labels):
            # d log p(label) / d logit(v) = (1[v = label] - p(v)) / temperature
            upstream = grad[row].unsqueeze(-1) / ctx.temperature  # (R, 1)
            row_grad = _scale(logits[row], ctx.temperature, suppressed)  # (R, V)
            row_grad.sub_(log_normalizers[row].unsqueeze(-1)).exp_().mul_(-upstream)
            row_grad.scatter_add_(-1, row_labels.unsqueeze(-1), upstream)
            grad_logits[row] = row_grad.index_fill_(-1, suppressed, 0.0)
        return grad_logits, None, None, None


def _scale(logits: torch.Tensor, temperature: float, suppressed: torch.Tensor) -> torch.Tensor:
    scaled = logits.float() / temperature  # divided in float32; a new tensor, which the callers may write into
    return scaled.index_fill_(-1, suppressed, torch.finfo(torch.float32).min)
