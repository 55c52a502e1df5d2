# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_advantages.py
"""Every estimator: hand values, what it must not depend on, and groups that have nothing to compare."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from verl.algorithms.advantages import (
    ADVANTAGE_ESTIMATORS,
    AdvantageInputs,
    compute_grpo_advantages,
    register_adv_estimator,
)
from verl.trainer.config import AlgorithmConfig

COMPARING = ("grpo", "grpo_passk", "rloo")
"""Estimators that hold a response against the others to its prompt."""


def on_last_token(rewards: list[float], lengths: list[int], uid: list[str], width: int = 4) -> AdvantageInputs:
    """Each reward on the last token of a response of the given length."""
    lengths = torch.tensor(lengths).unsqueeze(-1)  # (N, 1)
    places = torch.arange(width)
    token_level_rewards = (places == lengths - 1) * torch.tensor(rewards).unsqueeze(-1)
    return AdvantageInputs(
        token_level_rewards, (places < lengths).long(), np.array(uid, dtype=object), AlgorithmConfig()
    )


def advantage_of_rows(name: str, rewards: list[float], uid: list[str]) -> list[float]:
    inputs = on_last_token(rewards, [1] * len(rewards), uid)
    return ADVANTAGE_ESTIMATORS[name](inputs)[0][:, 0].tolist()


def draw_inputs(seed: int = 0) -> AdvantageInputs:
    """Twelve responses of 1 to 6 tokens to three prompts, with a reward and a value on every token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (12, 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    return AdvantageInputs(
        torch.randn(12, 6, generator=generator) * mask,
        mask,
        np.array([f"prompt{row // 4}" for row in range(12)], dtype=object),
        AlgorithmConfig(gamma=0.9, lam=0.8),
        values=torch.randn(12, 6, generator=generator),
        reward_baselines=torch.randn(3, generator=generator).repeat_interleave(4),
    )


# ---- by hand ----


def test_grpo_by_hand():
    """Group a has rewards 1, 0, 0: mean 1/3, unbiased variance (4/9 + 1/9 + 1/9) / 2 = 1/3, std 0.57735.

    (1 - 1/3) / 0.57735 = 1.15470 and -1/3 / 0.57735 = -0.57735.
    Group b, with rows between the rows of a, has 3 and 1: mean 2, std sqrt(2): +-0.70711.
    """
    inputs = on_last_token([1.0, 3.0, 0.0, 1.0, 0.0], [4, 1, 2, 3, 1], ["a", "b", "a", "b", "a"])
    advantages, returns = compute_grpo_advantages(inputs)
    expected = torch.tensor([[1.15470], [0.70711], [-0.57735], [-0.70711], [-0.57735]]) * inputs.response_mask
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    assert torch.equal(returns, advantages)


@pytest.mark.parametrize(("name", "expected"), [("grpo", 0.41421), ("grpo_passk", 0.82843)])
def test_eps_is_added_to_the_standard_deviation(name, expected):
    """Rewards 3 and 1: std sqrt(2), eps 1: 1 / (1.41421 + 1) = 0.41421, and (3 - 1) / (1.41421 + 1) = 0.82843."""
    inputs = on_last_token([3.0, 1.0], lengths=[1, 1], uid=["a", "a"])
    advantages, _ = ADVANTAGE_ESTIMATORS[name](inputs, eps=1.0)
    assert advantages[0, 0].item() == pytest.approx(expected, abs=1e-5)


def test_grpo_passk_by_hand():
    """Group a has 1, 0.5, 0: best less second 0.5, std 0.5, so 1 for the best and 0 for the others.

    Group b has 2, 2, 0: either best one could go without the maximum falling.
    """
    inputs = on_last_token([0.5, 2.0, 1.0, 2.0, 0.0, 0.0], [1, 2, 3, 4, 1, 2], ["a", "b", "a", "b", "a", "b"])
    advantages, returns = ADVANTAGE_ESTIMATORS["grpo_passk"](inputs)
    expected = torch.tensor([[0.0], [0.0], [1.0], [0.0], [0.0], [0.0]]) * inputs.response_mask
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    assert torch.equal(returns, advantages)


def test_rloo_by_hand():
    """Group a has 1, 0, 0.5: 1 - (0 + 0.5) / 2 = 0.75, 0 - (1 + 0.5) / 2 = -0.75, 0.5 - (1 + 0) / 2 = 0.

    Group b has 3 and 1: each against the other, 2 and -2.
    """
    inputs = on_last_token([1.0, 3.0, 0.0, 1.0, 0.5], [4, 1, 2, 3, 1], ["a", "b", "a", "b", "a"])
    advantages, returns = ADVANTAGE_ESTIMATORS["rloo"](inputs)
    expected = torch.tensor([[0.75], [2.0], [-0.75], [-2.0], [0.0]]) * inputs.response_mask
    torch.testing.assert_close(advantages, expected)
    assert torch.equal(returns, advantages)


def test_reinforce_plus_plus_by_hand():
    """Discount 1/2. Row 0 has rewards 0, 0, 4: returns 1, 2, 4. Row 1 has 1, then padding: return 1.

    Over the four tokens: mean 2, unbiased variance (1 + 0 + 4 + 1) / 3 = 2, std 1.41421.
    """
    inputs = on_last_token([4.0, 1.0], [3, 1], ["a", "b"], width=3)
    advantages, returns = ADVANTAGE_ESTIMATORS["reinforce_plus_plus"](
        replace(inputs, config=AlgorithmConfig(gamma=0.5))
    )
    torch.testing.assert_close(returns, torch.tensor([[1.0, 2.0, 4.0], [1.0, 0.0, 0.0]]))
    expected = torch.tensor([[-0.70711, 0.0, 1.41421], [-0.70711, 0.0, 0.0]])
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)


def test_remax_by_hand():
    """Rewards 1 and 0.25 against greedy scores 0.5 and 1: 0.5 and -0.75, on every token."""
    inputs = replace(on_last_token([1.0, 0.25], [3, 2], ["a", "b"]), reward_baselines=torch.tensor([0.5, 1.0]))
    advantages, returns = ADVANTAGE_ESTIMATORS["remax"](inputs)
    torch.testing.assert_close(advantages, torch.tensor([[0.5], [-0.75]]) * inputs.response_mask)
    assert torch.equal(returns, advantages)


def test_gae_by_hand():
    """gamma 1/2, lambda 1/2, so errors decay by 1/4. Row 0: rewards 0, 1, values 2, 4.

    Errors: 0 + 4/2 - 2 = 0 and 1 + 0 - 4 = -3; advantages -3/4 and -3; returns -0.75 + 2 = 1.25 and -3 + 4 = 1.
    Row 1, one token: reward 2, value 1: error and advantage 1, return 2; the value 9 of its padding counts nowhere.
    Whitened over -0.75, -3, 1: mean -11/12, unbiased variance (1/36 + 625/144 + 529/144) / 2 = 4.02083, std 2.00520.
    """
    inputs = replace(
        on_last_token([1.0, 2.0], [2, 1], ["a", "b"], width=2),
        values=torch.tensor([[2.0, 4.0], [1.0, 9.0]]),
        config=AlgorithmConfig(gamma=0.5, lam=0.5),
    )
    advantages, returns = ADVANTAGE_ESTIMATORS["gae"](inputs)
    torch.testing.assert_close(returns, torch.tensor([[1.25, 1.0], [2.0, 0.0]]))
    expected = torch.tensor([[-0.75, -3.0], [1.0, -11 / 12]]).add(11 / 12) / 2.00520
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["grpo", "grpo_passk", "reinforce_plus_plus"])
def test_scores_decide_which_groups_have_nothing_to_compare_where_a_kl_was_taken_off(name: str) -> None:
    """Equal scores less KLs of 0.001 and 0.003 are not equal, and would be divided by a deviation of 0.001."""
    kl = torch.tensor([[0.001, 0.0], [0.003, 0.0], [0.0, 0.0], [0.002, 0.0]])
    inputs = on_last_token([0.0] * 4, [2] * 4, ["a", "a", "b", "b"], width=2)
    inputs = replace(inputs, token_level_rewards=inputs.token_level_rewards - kl)
    assert ADVANTAGE_ESTIMATORS[name](inputs)[0].abs().max() > 0.3
    advantages, _ = ADVANTAGE_ESTIMATORS[name](replace(inputs, scores=torch.zeros(4)))
    assert (advantages == 0).all()
    unequal = replace(inputs, scores=torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert ADVANTAGE_ESTIMATORS[name](unequal)[0].any()


# ---- against the definition ----


def test_gae_is_the_decayed_sum_of_errors_written_out_row_by_row():
    inputs = draw_inputs()
    _, returns = ADVANTAGE_ESTIMATORS["gae"](inputs)
    for row in range(12):
        length = int(inputs.response_mask[row].sum())
        rewards, values = inputs.token_level_rewards[row].tolist(), [*inputs.values[row, :length].tolist(), 0.0]
        errors = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            advantage = sum((0.9 * 0.8) ** (later - t) * errors[later] for later in range(t, length))
            assert returns[row, t].item() == pytest.approx(advantage + values[t], abs=1e-5)
    assert (returns[inputs.response_mask == 0] == 0).all()


def test_gae_with_lambda_one_returns_the_discounted_rewards_whatever_the_values():
    """The values telescope: sum of gamma^l (r + gamma V_next - V) = discounted rewards - V."""
    inputs = replace(draw_inputs(), config=AlgorithmConfig(gamma=0.9, lam=1.0))
    _, returns = ADVANTAGE_ESTIMATORS["gae"](inputs)
    _, rewards_to_go = ADVANTAGE_ESTIMATORS["reinforce_plus_plus"](inputs)
    torch.testing.assert_close(returns, rewards_to_go, atol=1e-5, rtol=0)


def test_gae_with_lambda_zero_returns_one_step_targets():
    inputs = replace(draw_inputs(), config=AlgorithmConfig(gamma=0.9, lam=0.0))
    _, returns = ADVANTAGE_ESTIMATORS["gae"](inputs)
    following = torch.nn.functional.pad(inputs.values * inputs.response_mask, (0, 1))[:, 1:]
    expected = (inputs.token_level_rewards + 0.9 * following) * inputs.response_mask
    torch.testing.assert_close(returns, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gae", "reinforce_plus_plus"])
def test_a_token_off_the_mask_within_a_response_is_skipped(name):
    """The same response with a column of other tokens put into it: their values are never looked at."""
    inputs = draw_inputs()
    plain = ADVANTAGE_ESTIMATORS[name](inputs)

    def opened(streams: torch.Tensor, filling: float) -> torch.Tensor:
        return torch.cat([streams[:, :2], torch.full_like(streams[:, :1], filling), streams[:, 2:]], dim=1)

    wider = replace(
        inputs,
        token_level_rewards=opened(inputs.token_level_rewards, 0),
        response_mask=opened(inputs.response_mask, 0),
        values=opened(inputs.values, math.nan),
    )
    for streams, expected in zip(ADVANTAGE_ESTIMATORS[name](wider), plain, strict=True):
        torch.testing.assert_close(streams, opened(expected, 0))


@pytest.mark.parametrize("name", ["gae", "reinforce_plus_plus"])
def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens(name):
    inputs = draw_inputs()
    advantages, _ = ADVANTAGE_ESTIMATORS[name](inputs)
    of_tokens = advantages[inputs.response_mask.bool()]
    assert of_tokens.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert of_tokens.var().item() == pytest.approx(1.0, abs=1e-5)


# ---- what they must not depend on ----


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
def test_the_order_of_rows_does_not_matter(name):
    inputs = draw_inputs()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = replace(
        inputs,
        token_level_rewards=inputs.token_level_rewards[order],
        response_mask=inputs.response_mask[order],
        uid=inputs.uid[order.numpy()],
        values=inputs.values[order],
        reward_baselines=inputs.reward_baselines[order],
    )
    for streams, expected in zip(
        ADVANTAGE_ESTIMATORS[name](shuffled), ADVANTAGE_ESTIMATORS[name](inputs), strict=True
    ):
        torch.testing.assert_close(streams, expected[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
def test_results_are_float32_and_zero_outside_the_response_however_wide_the_padding(name):
    inputs = draw_inputs()
    padded = replace(
        inputs,
        token_level_rewards=torch.nn.functional.pad(inputs.token_level_rewards, (0, 3)),
        response_mask=torch.nn.functional.pad(inputs.response_mask, (0, 3)),
        values=torch.nn.functional.pad(inputs.values, (0, 3), value=7.0),
    )
    for streams, expected in zip(ADVANTAGE_ESTIMATORS[name](padded), ADVANTAGE_ESTIMATORS[name](inputs), strict=True):
        assert streams.dtype == torch.float32
        assert (streams[padded.response_mask == 0] == 0).all()
        torch.testing.assert_close(streams[:, :6], expected)


@pytest.mark.parametrize("name", COMPARING)
def test_shifting_the_rewards_of_a_prompt_changes_nothing(name):
    rewards = [0.0, 1.0, 0.5, 0.25]
    shifted = advantage_of_rows(name, [reward - 3.0 for reward in rewards], ["a"] * 4)
    assert shifted == pytest.approx(advantage_of_rows(name, rewards, ["a"] * 4), abs=1e-4)


@pytest.mark.parametrize(("name", "factor"), [("grpo", 1.0), ("grpo_passk", 1.0), ("rloo", 10.0)])
def test_scaling_the_rewards_changes_nothing_where_the_standard_deviation_divides(name, factor):
    rewards = [0.0, 1.0, 0.5, 0.25]
    scaled = advantage_of_rows(name, [10.0 * reward for reward in rewards], ["a"] * 4)
    expected = [factor * advantage for advantage in advantage_of_rows(name, rewards, ["a"] * 4)]
    assert scaled == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_the_advantages_of_a_prompt_add_up_to_zero(name):
    assert sum(advantage_of_rows(name, [0.0, 1.0, 0.5, 0.25], ["a"] * 4)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", [*COMPARING, "remax"])
def test_rewards_spread_over_tokens_count_by_their_sum(name):
    """KL in the reward puts a part on every token: 0.25 + 0.25 + 0.5 is the same response reward as 1 at the end."""
    at_end = on_last_token([1.0, 0.0], [3, 3], ["a", "a"], width=3)
    at_end = replace(at_end, reward_baselines=torch.tensor([0.5, 0.5]))
    spread = replace(at_end, token_level_rewards=torch.tensor([[0.25, 0.25, 0.5], [0.0, 0.0, 0.0]]))
    assert torch.equal(ADVANTAGE_ESTIMATORS[name](spread)[0], ADVANTAGE_ESTIMATORS[name](at_end)[0])


# ---- nothing to compare ----


@pytest.mark.parametrize("name", [*COMPARING, "reinforce_plus_plus"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -7.3])
def test_equal_rewards_have_exactly_zero_advantage(name, reward):
    assert advantage_of_rows(name, [reward] * 7, ["a"] * 7) == [0.0] * 7


@pytest.mark.parametrize("name", COMPARING)
def test_a_group_of_one_has_zero_advantage_beside_others_that_have_some(name):
    advantages = advantage_of_rows(name, [5.0, 1.0, 0.0], ["alone", "a", "a"])
    assert advantages[0] == 0.0
    assert advantages[1] > 0.0


@pytest.mark.parametrize("name", [*COMPARING, "reinforce_plus_plus"])
def test_a_batch_of_one_token_has_zero_advantage(name):
    assert advantage_of_rows(name, [5.0], ["alone"]) == [0.0]


def test_a_response_as_good_as_the_greedy_one_has_exactly_zero_advantage():
    inputs = replace(on_last_token([0.1, 0.7], [3, 2], ["a", "b"]), reward_baselines=torch.tensor([0.1, 0.7]))
    assert not ADVANTAGE_ESTIMATORS["remax"](inputs)[0].any()


# ---- the table ----


def test_estimators_are_found_by_name_and_a_name_is_given_once():
    assert ADVANTAGE_ESTIMATORS["grpo"] is compute_grpo_advantages
    register_adv_estimator("mine")(compute_grpo_advantages)
    assert ADVANTAGE_ESTIMATORS.pop("mine") is compute_grpo_advantages
    with pytest.raises(ValueError, match="'grpo' is already compute_grpo_advantages; use another name"):
        register_adv_estimator("grpo")(compute_grpo_advantages)
