# SPDX-License-Identifier: Apache-2.0
"""What a model's logits say of given tokens, in float32, without a float32 copy of all the logits.

Log-probabilities, the entropy of the distribution, and its KL from another model's. One row is upcast at a time,
forward and backward: at a vocabulary of 152k the float32 logits of a whole batch, and their softmax, would be the
largest tensors of a training step.

N sequences, R response length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenStatistics:
    """What the logits say of each position; all (N, R) float32, in nats."""

    log_probs: torch.Tensor
    """Log-probability of the label; differentiable once in the logits."""
    entropy: torch.Tensor
    """Entropy of the distribution; without gradient."""
    kl: torch.Tensor | None
    """KL(policy || reference) of the whole distributions; differentiable once in the policy's logits."""


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

    Returns (N, R) float32, differentiable once in `logits`.
    """
    suppressed = torch.tensor(list(suppressed_token_ids), dtype=torch.int64, device=logits.device)
    log_probs, _, _ = _Statistics.apply(logits, None, labels, temperature, suppressed, False)
    return log_probs


def token_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    suppressed_token_ids: Sequence[int] = (),
    ref_logits: torch.Tensor | None = None,
) -> TokenStatistics:
    """`log_probs_from_logits`, and from the same pass the entropy and the KL from a reference.

    Both are those of the distribution that the sampler drew from, at its temperature and without the suppressed ids;
    the reference is taken at the same temperature and without the same ids.

    ref_logits: (N, R, V), any floating type, without gradient; None for no KL.
    """
    suppressed = torch.tensor(list(suppressed_token_ids), dtype=torch.int64, device=logits.device)
    return TokenStatistics(*_Statistics.apply(logits, ref_logits, labels, temperature, suppressed, True))


class _Statistics(torch.autograd.Function):
    """Keeps the logits as they came and one number a token; the softmax is made again, row by row, when asked for."""

    @staticmethod
    def forward(ctx, logits, ref_logits, labels, temperature, suppressed, with_entropy):
        log_probs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)  # (N, R)
        log_normalizers = torch.empty_like(log_probs)  # (N, R)
        entropy = torch.empty_like(log_probs) if with_entropy else None  # (N, R)
        kl, ref_log_normalizers = None, None
        if ref_logits is not None:
            kl, ref_log_normalizers = torch.empty_like(log_probs), torch.empty_like(log_probs)  # (N, R)

        for row, row_labels in enumerate(labels):
            scaled = _scale(logits[row], temperature, suppressed)  # (R, V)
            log_normalizers[row] = scaled.logsumexp(-1)
            log_probs[row] = scaled.gather(-1, row_labels.unsqueeze(-1)).squeeze(-1) - log_normalizers[row]
            if not with_entropy:
                continue
            scaled.sub_(log_normalizers[row].unsqueeze(-1))
            probs = scaled.exp()  # (R, V)
            if ref_logits is not None:
                ref_scaled = _scale(ref_logits[row], temperature, suppressed)  # (R, V)
                ref_log_normalizers[row] = ref_scaled.logsumexp(-1)
                kl[row] = _log_ratio(scaled, ref_scaled, ref_log_normalizers[row], suppressed).mul_(probs).sum(-1)
            entropy[row] = torch.special.entr(probs).sum(-1)

        ctx.save_for_backward(logits, ref_logits, labels, log_normalizers, ref_log_normalizers, kl, suppressed)
        ctx.temperature = temperature
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, _, grad_kl):
        logits, ref_logits, labels, log_normalizers, ref_log_normalizers, kl, suppressed = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)  # (N, R, V)
        for row, row_labels in enumerate(labels):
            # d log p(label) / d logit(v) = (1[v = label] - p(v)) / temperature
            upstream = grad_log_probs[row].unsqueeze(-1) / ctx.temperature  # (R, 1)
            log_p = _scale(logits[row], ctx.temperature, suppressed)  # (R, V)
            log_p.sub_(log_normalizers[row].unsqueeze(-1))
            if ref_logits is None:
                row_grad = log_p.exp_().mul_(-upstream)
            else:
                # d KL / d logit(v) = p(v) (log p(v) - log q(v) - KL) / temperature
                ref_scaled = _scale(ref_logits[row], ctx.temperature, suppressed)  # (R, V)
                row_grad = _log_ratio(log_p, ref_scaled, ref_log_normalizers[row], suppressed)
                row_grad.sub_(kl[row].unsqueeze(-1)).mul_(grad_kl[row].unsqueeze(-1) / ctx.temperature)
                row_grad.sub_(upstream).mul_(log_p.exp_())
            row_grad.scatter_add_(-1, row_labels.unsqueeze(-1), upstream)
            grad_logits[row] = row_grad.index_fill_(-1, suppressed, 0.0)
        return grad_logits, None, None, None, None, None


def _scale(logits: torch.Tensor, temperature: float, suppressed: torch.Tensor) -> torch.Tensor:
    scaled = logits.float() / temperature  # divided in float32; a new tensor, which the callers may write into
    return scaled.index_fill_(-1, suppressed, torch.finfo(torch.float32).min)


def _log_ratio(
    log_p: torch.Tensor, ref_scaled: torch.Tensor, ref_log_normalizer: torch.Tensor, suppressed: torch.Tensor
) -> torch.Tensor:
    """log p - log q (R, V), written over `ref_scaled`; 0 for suppressed ids, which neither can draw."""
    return ref_scaled.sub_(ref_log_normalizer.unsqueeze(-1)).neg_().add_(log_p).index_fill_(-1, suppressed, 0.0)
