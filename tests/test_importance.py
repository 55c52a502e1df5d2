# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_importance.py
"""Correction for responses that the rollout engine drew with other probabilities than the trainer gives them."""

import math

import pytest
import torch

from verl.algorithms.importance import truncated_importance_weights
from verl.protocol import DataProto
from verl.trainer.metrics import compute_rollout_metrics

OLD = torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.6, 0.3]]).log()
ROLLOUT = torch.tensor([[0.25, 0.4, 0.1], [0.1, 0.6, 0.6]]).log()
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_weights_by_hand():
    """Ratios .5/.25 = 2, .2/.4 = .5 and .9/.1 = 9, which the cap of 3 holds; 1 in the second row; 0 beyond it."""
    weights = truncated_importance_weights(OLD, ROLLOUT, MASK, cap=3.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 3.0], [1.0, 0.0, 0.0]]))


def test_an_engine_that_agrees_gets_weights_of_exactly_one():
    assert torch.equal(truncated_importance_weights(OLD, OLD, MASK, cap=2.0), MASK.float())


def test_the_expectation_over_the_engines_draws_is_that_over_the_trainers_where_nothing_is_capped():
    """Sum over the vocabulary of engine probability x weight x loss, for three tokens with losses 1, 10 and 100."""
    trainer, engine = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.4, 0.2])
    losses = torch.tensor([1.0, 10.0, 100.0])
    weights = truncated_importance_weights(trainer.log()[None], engine.log()[None], torch.ones(1, 3), cap=10.0)[0]
    torch.testing.assert_close((engine * weights * losses).sum(), (trainer * losses).sum())


def test_no_gradient_flows_through_the_weights_and_a_far_ratio_stays_finite():
    old = torch.tensor([[0.0]], requires_grad=True)
    weights = truncated_importance_weights(old, torch.tensor([[-500.0]]), torch.ones(1, 1), cap=2.0)
    assert weights.item() == 2.0 and not weights.requires_grad


@pytest.mark.parametrize("cap", [None, 3.0])
def test_metrics_by_hand(cap):
    """Distances ln 2, ln 2, ln 9 and 0 over the four response tokens; weights 2, .5, 3 (at the cap) and 1."""
    batch = DataProto.from_dict({"response_mask": MASK, "rollout_log_probs": ROLLOUT, "old_log_probs": OLD})
    if cap is not None:
        batch.batch["importance_weights"] = truncated_importance_weights(OLD, ROLLOUT, MASK, cap)
    expected = {
        "rollout/log_prob_diff_mean": (2 * math.log(2) + math.log(9)) / 4,
        "rollout/log_prob_diff_max": math.log(9),
    }
    if cap is not None:
        expected |= {"rollout/importance_weight_mean": 6.5 / 4, "rollout/importance_capped": 0.25}
    assert compute_rollout_metrics(batch, cap) == pytest.approx(expected, rel=1e-6)
