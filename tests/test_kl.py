# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_kl.py
"""The KL estimators against hand values and against the true KL of a small distribution; KL in the reward."""

import math

import pytest
import torch

from verl.algorithms.kl import KL_PENALTIES, adapt_kl_coef, apply_kl_penalty, compute_kl


@pytest.mark.parametrize(
    ("kl_penalty", "expected"),
    [
        ("kl", [math.log(2), -math.log(2), 0.0]),
        ("abs", [math.log(2), math.log(2), 0.0]),
        ("mse", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2, 0.0]),
        ("low_var_kl", [0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 0.0]),
    ],
)
def test_estimators_by_hand(kl_penalty, expected):
    """Policy twice, half and just as likely as the reference: d = ln 2, -ln 2, 0.

    k3 = exp(-d) - 1 + d: 1/2 - 1 + ln 2 = 0.193, 2 - 1 - ln 2 = 0.307, 0.
    """
    ref_log_probs = torch.tensor([[-3.0, -1.0, -2.0]])
    log_probs = ref_log_probs + torch.tensor([[math.log(2), -math.log(2), 0.0]])
    torch.testing.assert_close(compute_kl(log_probs, ref_log_probs, kl_penalty), torch.tensor([expected]))


@pytest.mark.parametrize("kl_penalty", ["kl", "low_var_kl"])
def test_unbiased_estimators_average_to_the_true_kl(kl_penalty):
    """Policy (1/2, 1/4, 1/4), reference (1/4, 1/4, 1/2): KL = 1/2 ln 2 + 0 + 1/4 ln 1/2 = 1/4 ln 2."""
    policy, reference = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    mean = (policy * compute_kl(policy.log(), reference.log(), kl_penalty)).sum()
    assert mean.item() == pytest.approx(math.log(2) / 4, abs=1e-6)


@pytest.mark.parametrize(
    ("kl_penalty", "expected"),
    [("kl", 1.0), ("abs", 1.0), ("mse", math.log(2)), ("low_var_kl", 0.5)],
)
def test_gradients_in_the_policys_log_prob_by_hand(kl_penalty, expected):
    """At d = ln 2: 1, sign(d) = 1, d = ln 2, and 1 - exp(-d) = 1/2."""
    log_probs = torch.tensor([[math.log(2) - 1.0]], requires_grad=True)
    compute_kl(log_probs, torch.tensor([[-1.0]]), kl_penalty).sum().backward()
    assert log_probs.grad.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("difference", [-100.0, -5.0, 100.0])
def test_low_var_kl_is_bounded_by_ten_and_such_a_token_has_no_gradient(difference):
    """d = -100 is clamped to -20: exp(20) is 5e8. d = -5: 148 - 1 - 5 = 142. d = 100, clamped: 0 - 1 + 20 = 19."""
    log_probs = torch.tensor([[difference]], requires_grad=True)
    kl = compute_kl(log_probs, torch.zeros(1, 1), "low_var_kl")
    kl.sum().backward()
    assert kl.item() == 10.0
    assert log_probs.grad.item() == 0.0


def test_an_unknown_estimator_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=f"kl_penalty='k3' is not known; use one of {', '.join(KL_PENALTIES)}"):
        compute_kl(torch.zeros(1, 1), torch.zeros(1, 1), "k3")


def test_kl_in_the_reward_by_hand():
    """Coefficient 0.5. Row 0: KL 1, 3 take 0.5 and 1.5 from scores 0, 1. Row 1: KL 2 takes 1 from 4.

    Row means are 2 and 2, so the mean KL is 2; the 100 and the infinity of the padding count nowhere.
    """
    scores = torch.tensor([[0.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
    kl = torch.tensor([[1.0, 3.0, 100.0], [2.0, math.inf, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rewards, mean_kl = apply_kl_penalty(scores, kl, mask, kl_coef=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.5, -0.5, 0.0], [3.0, 0.0, 0.0]]))
    assert mean_kl == pytest.approx(2.0)


def test_the_mean_kl_counts_rows_equally_whatever_their_length():
    """Row means 1 (three tokens) and 4 (one token): (1 + 4) / 2 = 2.5, not the token mean 7 / 4."""
    kl = torch.tensor([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    _, mean_kl = apply_kl_penalty(torch.zeros(2, 3), kl, mask, kl_coef=1.0)
    assert mean_kl == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("mean_kl", "expected"),
    [(0.1, 0.5), (0.11, 0.51), (0.095, 0.495), (100.0, 0.52), (-1.0, 0.48)],
)
def test_the_adaptive_coefficient_by_hand(mean_kl, expected):
    """Target 0.1, coefficient 0.5, 2000 sequences of a horizon of 10000: a gain of 1/5.

    On target nothing changes. 0.11: error 0.1, times 1.02. 0.095: error -0.05, times 0.99. Errors are clipped to
    +-0.2: times 1.04 and 0.96 at most.
    """
    coefficient = adapt_kl_coef(0.5, mean_kl, num_sequences=2000, kl_target=0.1, kl_horizon=10000)
    assert coefficient == pytest.approx(expected)


def test_the_adaptive_coefficient_brings_a_kl_that_gives_way_to_it_to_the_target():
    """A policy whose KL is 0.02 over the coefficient: at a target of 0.1 that is a coefficient of 0.2."""
    coefficient = 1.0
    for _ in range(500):
        coefficient = adapt_kl_coef(coefficient, 0.02 / coefficient, 1000, 0.1, 10000)
    assert coefficient == pytest.approx(0.2, rel=1e-3)


def test_many_small_batches_adapt_about_as_fast_as_a_large_one():
    small = 1.0
    for _ in range(10):
        small = adapt_kl_coef(small, 1.0, 100, 0.1, 10000)
    assert small == pytest.approx(adapt_kl_coef(1.0, 1.0, 1000, 0.1, 10000), rel=1e-3)
