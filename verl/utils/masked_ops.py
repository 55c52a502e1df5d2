# SPDX-License-Identifier: Apache-2.0
"""Sums and means over the real tokens of padded tensors. N sequences, R response length."""

from __future__ import annotations

import torch

LOSS_AVG_MODES = ("token", "seq")


def masked_sum(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum of `values * mask`; a value with mask 0 counts as 0 even if it is infinite or NaN.

    `mask` broadcasts against `values` and may hold weights. No gradient reaches masked values.
    """
    return torch.where(mask != 0, values * mask, 0).sum(dim)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None, eps: float = 1e-8) -> torch.Tensor:
    """Mean of `values` over the tokens whose mask is 1; 0 where there is none.

    `mask` has the shape of `values`. `eps` only prevents a division by zero for an empty mask: added to a count of one
    or more it vanishes in float32.
    """
    return masked_sum(values, mask, dim) / (mask.sum(dim) + eps)


def masked_whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, R): values shifted and scaled to mean 0 and variance 1 over all tokens whose mask is 1; 0 on the others.

    (value - mean) / sqrt(variance + 1e-8), the variance being the unbiased one (n - 1). If all tokens have the
    same value, or there is only one, the result is exactly 0.

    `values` and `mask` have the same shape. Values under a mask of 0 may be infinite or NaN.
    """
    is_real = mask != 0
    real = values[is_real]  # (n,)
    # Compared, since the 1e-8 alone would scale the mean's rounding error up by 1e4.
    if (real == real[:1]).all():
        return torch.zeros_like(values)
    whitened = (values - real.mean()) * (real.var() + 1e-8).rsqrt()
    return torch.where(is_real, whitened, 0)


def aggregate_loss(
    per_token_loss: torch.Tensor,
    weighted_mask: torch.Tensor,
    response_mask: torch.Tensor,
    mode: str,
    num_tokens: torch.Tensor | float,
    num_sequences: torch.Tensor | float,
) -> torch.Tensor:
    """This micro-batch's part of a mini-batch's loss; the parts of all micro-batches and ranks add up to the whole.

    `token`: mean over all response tokens, so long responses count more.
    `seq`: mean over sequences of the mean over each one's tokens, so every response counts the same.

    per_token_loss: (N, R), the rows of this micro-batch.
    weighted_mask: (N, R), factor of each token's loss: the response mask, or the mask times token weights.
        The denominators stay plain counts, so that weights of one change nothing.
    response_mask: (N, R), 1 on response tokens.
    num_tokens, num_sequences: counts of the whole mini-batch over all micro-batches and all ranks.

    Returns a scalar. If gradients are averaged over W ranks, multiply it by W.
    Raises ValueError for an unknown mode.
    """
    if mode == "token":
        return masked_sum(per_token_loss, weighted_mask) / num_tokens

    if mode == "seq":
        tokens_of_row = response_mask.sum(-1).clamp(min=1)  # (N,)
        return (masked_sum(per_token_loss, weighted_mask, dim=-1) / tokens_of_row).sum() / num_sequences

    raise ValueError(f"loss_avg_mode='{mode}' is not known; use one of {', '.join(LOSS_AVG_MODES)}")
