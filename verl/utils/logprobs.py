# SPDX-License-Identifier: Apache-2.0
"""What a model's logits say of given tokens, in float32, without a float32 copy of all the logits.

Log-probabilities, the entropy of the distribution, and its KL from another model's. A few hundred positions of a row
are upcast at a time, forward and backward: at a vocabulary of 152k the float32 logits of one long response, and their
softmax, would be the largest tensors of a training step.

N sequences, R response length, V vocabulary, T positions of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

POSITIONS_AT_ONCE = 256  # at a vocabulary of 152k this is 156 MB a temporary, of which up to four live at once


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
    """Keeps the logits as they came and one number a token; the backward pass makes the softmax again, by pieces."""

    @staticmethod
    def forward(ctx, logits, ref_logits, labels, temperature, suppressed, with_entropy):
        log_probs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)  # (N, R)
        log_normalizers = torch.empty_like(log_probs)  # (N, R)
        entropy = torch.empty_like(log_probs) if with_entropy else None  # (N, R)
        kl, ref_log_normalizers = None, None
        if ref_logits is not None:
            kl, ref_log_normalizers = torch.empty_like(log_probs), torch.empty_like(log_probs)  # (N, R)

        for at in _pieces(labels):
            scaled = _scale(logits[at], temperature, suppressed)  # (T, V)
            log_normalizers[at] = scaled.logsumexp(-1)
            log_probs[at] = scaled.gather(-1, labels[at].unsqueeze(-1)).squeeze(-1) - log_normalizers[at]
            if not with_entropy:
                continue
            scaled.sub_(log_normalizers[at].unsqueeze(-1))
            probs = scaled.exp()  # (T, V)
            if ref_logits is not None:
                ref_scaled = _scale(ref_logits[at], temperature, suppressed)  # (T, V)
                ref_log_normalizers[at] = ref_scaled.logsumexp(-1)
                kl[at] = _log_ratio(scaled, ref_scaled, ref_log_normalizers[at], suppressed).mul_(probs).sum(-1)
            entropy[at] = torch.special.entr(probs).sum(-1)

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
        for at in _pieces(labels):
            # d log p(label) / d logit(v) = (1[v = label] - p(v)) / temperature
            upstream = grad_log_probs[at].unsqueeze(-1) / ctx.temperature  # (T, 1)
            log_p = _scale(logits[at], ctx.temperature, suppressed)  # (T, V)
            log_p.sub_(log_normalizers[at].unsqueeze(-1))
            if ref_logits is None:
                piece_grad = log_p.exp_().mul_(-upstream)
            else:
                # d KL / d logit(v) = p(v) (log p(v) - log q(v) - KL) / temperature
                ref_scaled = _scale(ref_logits[at], ctx.temperature, suppressed)  # (T, V)
                piece_grad = _log_ratio(log_p, ref_scaled, ref_log_normalizers[at], suppressed)
                piece_grad.sub_(kl[at].unsqueeze(-1)).mul_(grad_kl[at].unsqueeze(-1) / ctx.temperature)
                piece_grad.sub_(upstream).mul_(log_p.exp_())
            piece_grad.scatter_add_(-1, labels[at].unsqueeze(-1), upstream)
            grad_logits[at] = piece_grad.index_fill_(-1, suppressed, 0.0)
        return grad_logits, None, None, None, None, None


def _pieces(labels: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Indices of a row and of at most `POSITIONS_AT_ONCE` positions in it, which together cover `labels` (N, R)."""
    num_rows, length = labels.shape
    for row in range(num_rows):
        for start in range(0, length, POSITIONS_AT_ONCE):
            yield row, slice(start, start + POSITIONS_AT_ONCE)


def _scale(logits: torch.Tensor, temperature: float, suppressed: torch.Tensor) -> torch.Tensor:
    scaled = logits.to(torch.float32, copy=True).div_(temperature)  # a tensor that the callers may write into
    return scaled.index_fill_(-1, suppressed, torch.finfo(torch.float32).min)


def _log_ratio(
    log_p: torch.Tensor, ref_scaled: torch.Tensor, ref_log_normalizer: torch.Tensor, suppressed: torch.Tensor
) -> torch.Tensor:
    """log p - log q (T, V), written over `ref_scaled`; 0 for suppressed ids, which neither can draw."""
    return ref_scaled.sub_(ref_log_normalizer.unsqueeze(-1)).neg_().add_(log_p).index_fill_(-1, suppressed, 0.0)
