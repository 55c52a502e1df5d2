# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_policy_loss.py
"""The clipped loss, case by case, and what its gradient does at each bound."""

import math

import pytest
import torch

from verl.algorithms.policy_loss import POLICY_LOSSES, clipped_policy_loss, register_policy_loss

CLIPS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_dual": 3.0}

# ratio, advantage, loss, d loss / d log_prob, clipped ratio decides, dual clip decides
CASES = [
    (1.0, 1.0, -1.0, -1.0, 0, 0),
    (1.5, 1.0, -1.3, 0.0, 1, 0),
    (0.5, 1.0, -0.5, -0.5, 0, 0),
    (1.5, -1.0, 1.5, 1.5, 0, 0),
    (0.5, -1.0, 0.8, 0.0, 1, 0),
    (4.0, -1.0, 3.0, 0.0, 0, 1),
    (4.0, 2.0, -2.6, 0.0, 1, 0),
    (4.0, -2.0, 6.0, 0.0, 0, 1),
    (4.0, 0.0, 0.0, 0.0, 0, 0),
]


def column(index: int) -> torch.Tensor:
    return torch.tensor([[case[index] for case in CASES]], dtype=torch.float32)  # (1, R)


def test_loss_gradient_and_clip_fractions_by_hand():
    """Bounds 0.8 and 1.3, dual clip 3; loss max(-A r, -A clip(r)), and at most -3 A where A < 0.

    r 1.5, A 1: max(-1.5, -1.3) = -1.3, clipped. r 0.5, A 1: max(-0.5, -0.8) = -0.5.
    r 1.5, A -1: max(1.5, 1.3) = 1.5. r 0.5, A -1: max(0.5, 0.8) = 0.8, clipped.
    r 4, A -1: max(4, 1.3) = 4, bounded to 3. r 4, A 2: max(-8, -2.6) = -2.6, clipped; the bound is for A < 0 only.
    r 4, A -2: max(8, 2.6) = 8, bounded to 6.
    Where r itself decides the gradient in log_prob is -A r, elsewhere 0.
    """
    old_log_probs = torch.full((1, len(CASES)), -2.0)
    log_probs = (old_log_probs + column(0).log()).requires_grad_()
    loss, metrics = clipped_policy_loss(log_probs, old_log_probs, column(1), **CLIPS)
    loss.sum().backward()

    torch.testing.assert_close(loss.detach(), column(2))
    torch.testing.assert_close(log_probs.grad, column(3))
    torch.testing.assert_close(metrics["pg_clipfrac_higher"], column(4))
    torch.testing.assert_close(metrics["pg_clipfrac_lower"], column(5))
    torch.testing.assert_close(metrics["ppo_kl"], -column(0).log())


def test_on_policy_the_gradient_is_minus_the_advantage():
    log_probs = torch.tensor([[-0.1, -3.0]], requires_grad=True)
    advantages = torch.tensor([[0.7, -1.2]])
    loss, metrics = clipped_policy_loss(log_probs, log_probs.detach(), advantages, **CLIPS)
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)
    assert not any(metric.any() for metric in metrics.values())


def test_an_absurd_log_ratio_stays_finite():
    """exp(100) overflows float32; clamped to exp(20) the loss of A = 1 is -1.3, of A = -1 it is 3."""
    log_probs = torch.tensor([[0.0, 0.0]], requires_grad=True)
    loss, metrics = clipped_policy_loss(log_probs, torch.full((1, 2), -100.0), torch.tensor([[1.0, -1.0]]), **CLIPS)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([[-1.3, 3.0]]))
    assert log_probs.grad.tolist() == [[0.0, 0.0]]
    assert metrics["ppo_kl"].tolist() == [[-20.0, -20.0]]


def test_without_bounds_it_is_plain_importance_sampling():
    generator = torch.Generator().manual_seed(0)
    log_probs, old_log_probs, advantages = torch.randn(3, 4, 5, generator=generator)
    loss, _ = clipped_policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        clip_ratio_low=1.0,
        clip_ratio_high=math.inf,
        clip_ratio_dual=math.inf,
    )
    torch.testing.assert_close(loss, -advantages * (log_probs - old_log_probs).exp())


def test_metrics_carry_no_gradient():
    log_probs = torch.zeros(2, 3, requires_grad=True)
    _, metrics = clipped_policy_loss(log_probs, torch.zeros(2, 3), torch.ones(2, 3), **CLIPS)
    assert {name: (metric.shape, metric.requires_grad) for name, metric in metrics.items()} == {
        name: (torch.Size([2, 3]), False) for name in ("pg_clipfrac_higher", "pg_clipfrac_lower", "ppo_kl")
    }


def test_losses_are_found_by_name_and_a_name_is_given_once(monkeypatch):
    assert POLICY_LOSSES["default"] is clipped_policy_loss
    monkeypatch.setattr("verl.algorithms.policy_loss.POLICY_LOSSES", dict(POLICY_LOSSES))
    register_policy_loss("mine")(clipped_policy_loss)
    assert "mine" not in POLICY_LOSSES
    with pytest.raises(ValueError, match="policy loss 'default' is already clipped_policy_loss; use another name"):
        register_policy_loss("default")(clipped_policy_loss)
