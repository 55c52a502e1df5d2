# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, entropy and KL of given tokens, in float32, without ever storing all logits.

A few hundred positions at a time are multiplied with the model's output head and upcast, in the forward pass and again
in the backward pass. With a vocabulary of 152k, the logits of one micro-batch's responses and their softmax would
otherwise be the largest tensors of a training step.

L positions, V vocabulary, H hidden size, T positions of a piece. Shapes (...) are of any number of dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from verl.utils.device_copies import to_device

POSITIONS_AT_ONCE = 512  # with a vocabulary of 152k a temporary takes 311 MB, and up to four exist at once


@dataclass(frozen=True)
class LazyLogits:
    """Logits before their computation: hidden states and the linear head that turns them into logits.

    Without a head the states are the logits, or another output of the model in their place.
    """

    states: torch.Tensor
    """(..., H); without a head (..., V)."""
    weight: torch.Tensor | None = None
    """(V, H) of the head."""
    bias: torch.Tensor | None = None
    """(V,) of the head."""


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each position; all have the labels' shape, float32, in nats."""

    log_probs: torch.Tensor
    """Log-probability of the label; differentiable once in the logits, or in hidden states and head."""
    entropy: torch.Tensor | None
    """Entropy of the distribution; without gradient."""
    kl: torch.Tensor | None
    """KL(policy || reference) over the whole vocabulary; differentiable once, like the log-probability."""


def log_probs_from_logits(
    logits: torch.Tensor | LazyLogits,
    labels: torch.Tensor,
    temperature: float = 1.0,
    suppressed_token_ids: Sequence[int] = (),
) -> torch.Tensor:
    """Log-probability of each label under the distribution that the sampler drew from.

    logits: (..., V), any floating type, or `LazyLogits`.
    labels: (...) int64. A suppressed id as label gets about -3.4e38.
    temperature: of the sampler; logits are divided by it.
    suppressed_token_ids: ids that the sampler never draws; they get no probability here either.

    Returns (...) float32, differentiable once in `logits`.
    """
    return token_statistics(logits, labels, temperature, suppressed_token_ids, with_entropy=False).log_probs


def token_statistics(
    logits: torch.Tensor | LazyLogits,
    labels: torch.Tensor,
    temperature: float = 1.0,
    suppressed_token_ids: Sequence[int] = (),
    ref_logits: torch.Tensor | LazyLogits | None = None,
    with_entropy: bool = True,
) -> TokenStatistics:
    """`log_probs_from_logits`, with the entropy and the KL from a reference.

    Entropy and KL refer to the distribution that the sampler drew from, at its temperature and without the
    suppressed ids. The reference distribution has the same temperature and lacks the same ids.

    ref_logits: as `logits`, without gradient; None for no KL.
    with_entropy: False skips the entropy, which is then None.
    """
    suppressed = to_device(torch.tensor(list(suppressed_token_ids), dtype=torch.int64), labels.device)
    policy, reference = _flat_parts(logits, labels), _flat_parts(ref_logits, labels)
    flat = _Statistics.apply(*policy, *reference, labels.flatten(), temperature, suppressed, with_entropy)
    return TokenStatistics(*(None if values is None else values.view(labels.shape) for values in flat))


def _flat_parts(
    logits: torch.Tensor | LazyLogits | None, labels: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """States (L, V) or (L, H), weight and bias; all None without logits."""
    if logits is None:
        return None, None, None
    lazy = logits if isinstance(logits, LazyLogits) else LazyLogits(logits)
    assert lazy.states.shape[:-1] == labels.shape, (
        f"labels are {tuple(labels.shape)}, but logits of {tuple(lazy.states.shape[:-1])}"
    )
    return lazy.states.flatten(0, -2), lazy.weight, lazy.bias


class _Statistics(torch.autograd.Function):
    """Saves its inputs and one number per token; the backward pass recomputes logits and softmax piece by piece.

    Its inputs are flat: states (L, V) or (L, H), labels (L,).

    Libraries have kernels for parts of this. torch's `linear_cross_entropy` and the cross entropies of Liger and of
    Cut Cross-Entropy fuse the head with the label's log-probability, but give no entropy and no KL, for which the head
    would have to be multiplied again; Liger's takes gradients in the forward pass, before the tokens' weights are
    known; the last two need a GPU. FlashAttention's cross entropy starts from whole logits.
    """

    @staticmethod
    def forward(
        ctx, states, weight, bias, ref_states, ref_weight, ref_bias, labels, temperature, suppressed, with_entropy
    ):
        log_probs = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)  # (L,)
        log_normalizers = torch.empty_like(log_probs)  # (L,)
        entropy = torch.empty_like(log_probs) if with_entropy else None  # (L,)
        kl, ref_log_normalizers = None, None
        if ref_states is not None:
            kl, ref_log_normalizers = torch.empty_like(log_probs), torch.empty_like(log_probs)  # (L,)

        for at in _pieces(labels):
            scaled = _scaled_logits(states[at], weight, bias, temperature, suppressed)  # (T, V)
            log_normalizers[at] = scaled.logsumexp(-1)
            log_probs[at] = scaled.gather(-1, labels[at].unsqueeze(-1)).squeeze(-1) - log_normalizers[at]
            if entropy is None and kl is None:
                continue
            scaled.sub_(log_normalizers[at].unsqueeze(-1))
            probs = scaled.exp()  # (T, V)
            if ref_states is not None:
                ref_scaled = _scaled_logits(ref_states[at], ref_weight, ref_bias, temperature, suppressed)  # (T, V)
                ref_log_normalizers[at] = ref_scaled.logsumexp(-1)
                kl[at] = _log_ratio(scaled, ref_scaled, ref_log_normalizers[at], suppressed).mul_(probs).sum(-1)
            if entropy is not None:
                entropy[at] = torch.special.entr(probs).sum(-1)

        ctx.save_for_backward(
            states, weight, bias, ref_states, ref_weight, ref_bias, labels, log_normalizers, ref_log_normalizers, kl,
            suppressed,
        )  # fmt: skip
        ctx.temperature = temperature
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, _, grad_kl):
        states, weight, bias, *reference, labels, log_normalizers, ref_log_normalizers, kl, suppressed = (
            ctx.saved_tensors
        )
        ref_states, ref_weight, ref_bias = reference
        grad_states = torch.empty_like(states)  # (L, V) or (L, H)
        # Pieces are summed in float32: a bf16 sum of many would lose the small ones.
        grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for at in _pieces(labels):
            # d log p(label) / d logit(v) = (1[v = label] - p(v)) / temperature
            upstream = grad_log_probs[at].unsqueeze(-1) / ctx.temperature  # (T, 1)
            log_p = _scaled_logits(states[at], weight, bias, ctx.temperature, suppressed)  # (T, V)
            log_p.sub_(log_normalizers[at].unsqueeze(-1))
            if ref_states is None:
                piece_grad = log_p.exp_().mul_(-upstream)
            else:
                # d KL / d logit(v) = p(v) (log p(v) - log q(v) - KL) / temperature
                ref_scaled = _scaled_logits(ref_states[at], ref_weight, ref_bias, ctx.temperature, suppressed)
                piece_grad = _log_ratio(log_p, ref_scaled, ref_log_normalizers[at], suppressed)
                piece_grad.sub_(kl[at].unsqueeze(-1)).mul_(grad_kl[at].unsqueeze(-1) / ctx.temperature)
                piece_grad.sub_(upstream).mul_(log_p.exp_())
            piece_grad.scatter_add_(-1, labels[at].unsqueeze(-1), upstream)
            piece_grad.index_fill_(-1, suppressed, 0.0)  # (T, V)
            if weight is None:
                grad_states[at] = piece_grad
                continue
            if grad_bias is not None:
                grad_bias += piece_grad.sum(0)
            piece_grad = piece_grad.to(weight.dtype)
            grad_states[at] = piece_grad @ weight
            if grad_weight is not None:
                grad_weight += piece_grad.T @ states[at]
        head_grads = (
            None if grad is None else grad.to(tensor.dtype)
            for grad, tensor in ((grad_weight, weight), (grad_bias, bias))
        )
        return grad_states, *head_grads, *[None] * 7


def _pieces(labels: torch.Tensor) -> Iterator[slice]:
    """Slices of at most `POSITIONS_AT_ONCE` positions that together cover `labels` (L,)."""
    for start in range(0, len(labels), POSITIONS_AT_ONCE):
        yield slice(start, start + POSITIONS_AT_ONCE)


def _scaled_logits(
    states: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    temperature: float,
    suppressed: torch.Tensor,
) -> torch.Tensor:
    """Logits divided by the temperature, (T, V) float32: a new tensor, which callers may overwrite."""
    if weight is None:
        scaled = states.to(torch.float32, copy=True)
    else:
        scaled = linear(states, weight, bias).to(torch.float32)
    return scaled.div_(temperature).index_fill_(-1, suppressed, torch.finfo(torch.float32).min)


def _log_ratio(
    log_p: torch.Tensor, ref_scaled: torch.Tensor, ref_log_normalizer: torch.Tensor, suppressed: torch.Tensor
) -> torch.Tensor:
    """log p - log q (T, V), written over `ref_scaled`; 0 for suppressed ids, which neither distribution has."""
    return ref_scaled.sub_(ref_log_normalizer.unsqueeze(-1)).neg_().add_(log_p).index_fill_(-1, suppressed, 0.0)
