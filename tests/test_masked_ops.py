# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_masked_ops.py
"""Masked reductions, and a loss whose parts add up to the whole however the mini-batch is cut."""

import pytest
import torch

from verl.utils.masked_ops import aggregate_loss, masked_mean, masked_sum, masked_whiten


def test_means_and_sums_count_only_what_the_mask_keeps():
    """Row 0 keeps 1 and 2, row 1 keeps 9: sums 3 and 9, means 1.5 and 9, over all 12 and 12 / 3 = 4."""
    values = torch.tensor([[1.0, 2.0, 7.0], [5.0, 9.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert masked_sum(values, mask).item() == 12.0
    assert masked_sum(values, mask, dim=-1).tolist() == [3.0, 9.0]
    assert masked_mean(values, mask).item() == 4.0
    assert masked_mean(values, mask, dim=-1).tolist() == [1.5, 9.0]


def test_an_empty_mask_has_mean_zero():
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3), dim=-1).tolist() == [0.0, 0.0]


def test_infinite_and_nan_values_under_the_mask_change_neither_value_nor_gradient():
    values = torch.tensor([[2.0, float("nan"), float("inf")]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 0.0]])
    mean = masked_mean(values, mask)
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad.tolist() == [[1.0, 0.0, 0.0]]


def test_whitening_by_hand_leaves_what_is_masked_out():
    """Kept are 1, 3 and 5: mean 3, unbiased variance (4 + 0 + 4) / 2 = 4, so -1, 0, 1."""
    values = torch.tensor([[1.0, float("nan"), 3.0], [5.0, float("inf"), 900.0]])
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    torch.testing.assert_close(masked_whiten(values, mask), torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("count", [7, 1, 0])
def test_whitening_makes_equal_values_a_single_one_and_none_exactly_zero(count):
    """The float32 mean of seven 0.7 is off by 6e-8, which 1 / sqrt(1e-8) would make 6e-4."""
    mask = (torch.arange(8) < count).long()
    assert masked_whiten(torch.full((8,), 0.7), mask).tolist() == [0.0] * 8


def test_token_mode_and_seq_mode_by_hand():
    """Row 0 has losses 1 and 1, row 1 has 3. Token mean (1 + 1 + 3) / 3 = 5/3; mean of row means (1 + 3) / 2 = 2.

    Weights 2 on the very first token and 1 elsewhere: token (2 + 1 + 3) / 3 = 2; seq ((2 + 1) / 2 + 3) / 2 = 2.25.
    """
    loss = torch.tensor([[1.0, 1.0], [3.0, 100.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    weights = mask * torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert aggregate_loss(loss, mask, mask, "token", 3, 2).item() == pytest.approx(5 / 3)
    assert aggregate_loss(loss, mask, mask, "seq", 3, 2).item() == pytest.approx(2.0)
    assert aggregate_loss(loss, weights, mask, "token", 3, 2).item() == pytest.approx(2.0)
    assert aggregate_loss(loss, weights, mask, "seq", 3, 2).item() == pytest.approx(2.25)


def draw_mini_batch(rows: int = 12, length: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (N, R), token weights (N, R) and masks (N, R) of responses of 1 to R tokens."""
    generator = torch.Generator().manual_seed(0)
    loss = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    token_weights = torch.rand(rows, length, generator=generator, dtype=torch.float64) + 0.5
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return loss, token_weights, (torch.arange(length) < lengths).long()


@pytest.mark.parametrize("mode", ["token", "seq"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_micro_batches_and_ranks_add_up_to_the_whole_mini_batch(mode, ranks, micro_batches):
    """As an engine does it: each rank sums its micro-batches' gradients of W times the loss, then ranks average.

    The reference is written out: the mean over all tokens, or the mean over rows of each row's mean.
    """
    loss, token_weights, mask = draw_mini_batch()
    whole = loss.clone().requires_grad_()
    weighted = whole * token_weights * mask
    expected = weighted.sum() / mask.sum() if mode == "token" else (weighted.sum(-1) / mask.sum(-1)).mean()
    expected.backward()

    parts = loss.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(loss)).chunk(ranks * micro_batches):
        weights = token_weights[rows] * mask[rows]
        part = aggregate_loss(parts[rows], weights, mask[rows], mode, mask.sum(), len(loss))
        (part * ranks).backward()
        total += part.detach()

    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(parts.grad / ranks, whole.grad)


@pytest.mark.parametrize("mode", ["token", "seq"])
def test_token_weights_of_one_change_nothing_bit_for_bit(mode):
    loss, _, mask = draw_mini_batch()
    loss = loss.float()
    plain = aggregate_loss(loss, mask, mask, mode, mask.sum(), len(loss))
    weighted = aggregate_loss(loss, mask * torch.ones_like(loss), mask, mode, mask.sum(), len(loss))
    assert torch.equal(plain, weighted)


def test_a_response_without_tokens_adds_nothing_in_seq_mode():
    loss = torch.tensor([[4.0, 4.0], [4.0, 4.0]])
    mask = torch.tensor([[1, 1], [0, 0]])
    assert aggregate_loss(loss, mask, mask, "seq", 2, 2).item() == 2.0


def test_an_unknown_mode_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="loss_avg_mode='tokens' is not known; use one of token, seq"):
        aggregate_loss(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), "tokens", 1, 1)
