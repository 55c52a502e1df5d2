# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_advantages.py
"""Group-relative advantages: hand values and what they must not depend on."""

import numpy as np
import pytest
import torch

from verl.algorithms.advantages import ADVANTAGE_ESTIMATORS, compute_grpo_advantages, register_adv_estimator


def on_last_token(rewards: list[float], lengths: list[int], width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-level rewards (N, R) with each reward on its response's last token, and response masks (N, R)."""
    lengths = torch.tensor(lengths).unsqueeze(-1)  # (N, 1)
    places = torch.arange(width)
    return (places == lengths - 1) * torch.tensor(rewards).unsqueeze(-1), (places < lengths).long()


def advantage_of_rows(rewards: list[float], uid: list[str]) -> list[float]:
    token_level_rewards, mask = on_last_token(rewards, [1] * len(rewards))
    advantages, _ = compute_grpo_advantages(token_level_rewards, mask, np.array(uid, dtype=object))
    return advantages[:, 0].tolist()


def test_advantages_by_hand():
    """Group a has rewards 1, 0, 0: mean 1/3, unbiased variance (4/9 + 1/9 + 1/9) / 2 = 1/3, std 0.57735.

    (1 - 1/3) / 0.57735 = 1.15470 and -1/3 / 0.57735 = -0.57735.
    Group b, rows between those of a, has 3 and 1: mean 2, std sqrt(2): +-0.70711.
    """
    rewards, mask = on_last_token([1.0, 3.0, 0.0, 1.0, 0.0], lengths=[4, 1, 2, 3, 1])
    uid = np.array(["a", "b", "a", "b", "a"], dtype=object)
    advantages, returns = compute_grpo_advantages(rewards, mask, uid)
    expected = torch.tensor([[1.15470], [0.70711], [-0.57735], [-0.70711], [-0.57735]]) * mask
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    assert torch.equal(returns, advantages)
    assert advantages.dtype == torch.float32


def test_eps_is_added_to_the_standard_deviation():
    """Rewards 3 and 1: std sqrt(2), eps 1: 1 / (1.41421 + 1) = 0.41421."""
    rewards, mask = on_last_token([3.0, 1.0], lengths=[1, 1])
    advantages, _ = compute_grpo_advantages(rewards, mask, np.array(["a", "a"], dtype=object), eps=1.0)
    assert advantages[:, 0].tolist() == pytest.approx([0.41421, -0.41421], abs=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -7.3])
def test_a_group_with_equal_rewards_has_exactly_zero_advantage(reward):
    assert advantage_of_rows([reward] * 7, ["a"] * 7) == [0.0] * 7


def test_a_group_of_one_has_zero_advantage():
    assert advantage_of_rows([5.0, 1.0, 0.0], ["alone", "a", "a"])[0] == 0.0


def test_the_order_of_rows_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(12, generator=generator).tolist()
    uid = [f"prompt{row // 4}" for row in range(12)]
    order = torch.randperm(12, generator=generator).tolist()
    shuffled = advantage_of_rows([rewards[row] for row in order], [uid[row] for row in order])
    in_order = advantage_of_rows(rewards, uid)
    assert shuffled == pytest.approx([in_order[row] for row in order], abs=1e-6)


def test_shifting_and_scaling_the_rewards_of_a_prompt_changes_nothing():
    rewards = [0.0, 1.0, 0.5, 0.25]
    scaled = [10.0 * reward - 3.0 for reward in rewards]
    expected = advantage_of_rows(rewards, ["a"] * 4)
    assert advantage_of_rows(scaled, ["a"] * 4) == pytest.approx(expected, abs=1e-4)
    assert sum(expected) == pytest.approx(0.0, abs=1e-6)


def test_rewards_spread_over_tokens_count_by_their_sum():
    """KL in the reward puts a part on every token: 0.25 + 0.25 + 0.5 is the same response reward as 1 at the end."""
    mask = torch.ones(2, 3)
    uid = np.array(["a", "a"], dtype=object)
    spread, _ = compute_grpo_advantages(torch.tensor([[0.25, 0.25, 0.5], [0.0, 0.0, 0.0]]), mask, uid)
    at_end, _ = compute_grpo_advantages(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), mask, uid)
    assert torch.equal(spread, at_end)


def test_estimators_are_found_by_name_and_a_name_is_given_once(monkeypatch):
    assert ADVANTAGE_ESTIMATORS["grpo"] is compute_grpo_advantages
    monkeypatch.setattr("verl.algorithms.advantages.ADVANTAGE_ESTIMATORS", dict(ADVANTAGE_ESTIMATORS))
    register_adv_estimator("mine")(compute_grpo_advantages)
    with pytest.raises(ValueError, match="'grpo' is already compute_grpo_advantages; use another name"):
        register_adv_estimator("grpo")(compute_grpo_advantages)
