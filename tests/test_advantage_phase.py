# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_advantage_phase.py
"""The trainer's phase from scores to advantages: which streams and settings reach the estimator, and where KL goes."""

import numpy as np
import pytest
import torch

from verl.algorithms.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from verl.protocol import DataProto
from verl.trainer.config import load_config
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.run_state import RunState
from verl.trainer.step_record import StepRecord


def trainer_with(*overrides: str) -> RayDAPOTrainer:
    """A trainer that has not started anything: this phase needs its configuration alone."""
    trainer = object.__new__(RayDAPOTrainer)
    trainer.config = load_config(list(overrides))
    trainer.state = RunState(trainer.config)
    return trainer


@pytest.fixture
def batch() -> DataProto:
    """Eight responses of 1 to 4 tokens to two prompts, with every stream an estimator may want."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(4) < torch.tensor([[4], [1], [2], [3], [2], [4], [1], [3]])).long()
    scores = torch.zeros(8, 4).scatter(1, mask.sum(1, keepdim=True) - 1, torch.rand(8, 1, generator=generator))
    return DataProto.from_dict(
        {
            "token_level_scores": scores,
            "response_mask": mask,
            "old_log_probs": -torch.rand(8, 4, generator=generator),
            "ref_log_probs": -torch.rand(8, 4, generator=generator),
            "values": torch.rand(8, 4, generator=generator),
            "reward_baselines": torch.rand(8, generator=generator),
        },
        {"uid": np.array(["a", "b"] * 4, dtype=object)},
    )


def compute(trainer: RayDAPOTrainer, batch: DataProto, step: int = 1) -> tuple[DataProto, dict[str, float]]:
    """The batch after the phase, and the metrics of the KL."""
    record = StepRecord(step)
    result = trainer._compute_advantages(batch[list(range(len(batch)))], record)
    return result, {name: value for name, value in record.metrics.items() if name.startswith("actor/")}


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
def test_the_streams_and_the_settings_of_an_estimator_reach_it(name: str, batch: DataProto) -> None:
    trainer = trainer_with(
        f"algorithm.adv_estimator={name}",
        "algorithm.gamma=0.9",
        "algorithm.lam=0.8",
        "algorithm.disable_kl=true",
    )
    streams = compute(trainer, batch)[0].batch
    given = AdvantageInputs(
        batch.batch["token_level_scores"],
        batch.batch["response_mask"],
        batch.non_tensor_batch["uid"],
        trainer.config.algorithm,
        values=batch.batch["values"],
        reward_baselines=batch.batch["reward_baselines"],
    )
    advantages, returns = ADVANTAGE_ESTIMATORS[name](given)
    assert advantages.any()
    assert torch.equal(streams["advantages"], advantages)
    assert torch.equal(streams["returns"], returns)
    assert torch.equal(streams["token_level_rewards"], streams["token_level_scores"])


def test_a_full_kl_goes_before_the_estimate_of_the_log_probs(batch: DataProto) -> None:
    """0.5 on every token, at a coefficient of 0.1: every real token pays 0.05."""
    trainer = trainer_with("algorithm.kl_penalty=full", "algorithm.kl_coef=0.1")
    batch.batch["ref_kl"] = torch.full((8, 4), 0.5)
    result, metrics = compute(trainer, batch)
    expected = batch.batch["token_level_scores"] - 0.05 * batch.batch["response_mask"]
    torch.testing.assert_close(result.batch["token_level_rewards"], expected)
    assert metrics == pytest.approx({"actor/kl_penalty": 0.5, "actor/kl_coef": 0.1})


def test_an_adaptive_coefficient_changes_after_it_was_applied(batch: DataProto) -> None:
    """KL 0.5 against a target of 0.1 is an error of 0.2 at most: 8 sequences of a horizon of 80 make 0.1 to 0.102."""
    trainer = trainer_with(
        "algorithm.kl_penalty=full",
        "algorithm.kl_coef=0.1",
        "algorithm.kl_type=adaptive",
        "algorithm.kl_horizon=80",
        "algorithm.kl_target=0.1",
    )
    batch.batch["ref_kl"] = torch.full((8, 4), 0.5)
    coefficients = [compute(trainer, batch)[1]["actor/kl_coef"] for _ in range(3)]
    assert coefficients == pytest.approx([0.1, 0.102, 0.10404])


def test_an_adaptive_coefficient_waits_with_the_actor_for_the_critic(batch: DataProto) -> None:
    """Before step 3 the policy is its reference: its KL of 0 would only make the coefficient shrink."""
    trainer = trainer_with(
        "algorithm.kl_penalty=full",
        "algorithm.kl_coef=0.1",
        "algorithm.kl_type=adaptive",
        "algorithm.kl_horizon=80",
        "trainer.critic_warmup=3",
    )
    batch.batch["ref_kl"] = torch.zeros(8, 4)
    coefficients = []
    for step in (1, 2, 3):
        compute(trainer, batch, step)
        coefficients.append(trainer.state.kl_coef)
    assert coefficients == pytest.approx([0.1, 0.1, 0.098])


@pytest.mark.parametrize("place", ["algorithm.use_kl_loss=true", "algorithm.disable_kl=true"])
def test_rewards_are_the_scores_where_the_kl_is_in_the_loss_or_off(place: str, batch: DataProto) -> None:
    trainer = trainer_with(place, "algorithm.kl_type=adaptive", "algorithm.kl_coef=0.1")
    result, metrics = compute(trainer, batch)
    assert torch.equal(result.batch["token_level_rewards"], batch.batch["token_level_scores"])
    assert metrics == {}
    assert trainer.state.kl_coef == 0.1


def test_with_the_kl_in_the_reward_groups_of_equal_scores_have_no_advantage(batch: DataProto) -> None:
    """Gradient norm 1.35 at reward 0 everywhere was what KL's rounding came to; in the loss it has a weight."""
    batch.batch["token_level_scores"] = torch.zeros(8, 4)
    for place, has_advantages in (("reward", False), ("loss", False)):
        trainer = trainer_with(f"algorithm.use_kl_loss={str(place == 'loss').lower()}")
        assert compute(trainer, batch)[0].batch["advantages"].any() == has_advantages
    result, metrics = compute(trainer_with(), batch)
    assert metrics["actor/kl_penalty"] != 0
    assert result.batch["token_level_rewards"].any()
