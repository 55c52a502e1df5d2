# SPDX-License-Identifier: Apache-2.0
"""From a step's scores to its advantages: subtracts the KL from the rewards, then runs the advantage estimator.

Shapes: N rows, R response length.
"""

from verl.algorithms.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from verl.algorithms.kl import adapt_kl_coef, apply_kl_penalty, compute_kl
from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig
from verl.trainer.run_state import RunState


def compute_advantages(
    batch: DataProto, algorithm: AlgorithmConfig, state: RunState, kl_coef_may_adapt: bool
) -> dict[str, float]:
    """Reads: `token_level_scores`, `response_mask`, `uid`; for KL in the reward `ref_kl`, or `old_log_probs` and
    `ref_log_probs`; `values` (N, R) or `reward_baselines` (N,) where the estimator needs them. Adds:
    `token_level_rewards`, `advantages`, `returns`.

    Args:
        state: has the KL coefficient; an adaptive one then follows the KL, for the next step.
        kl_coef_may_adapt: false during the critic's warm-up, when the policy does not change and its KL says nothing.

    Returns:
        Metrics of the KL in the reward; empty without one.
    """
    streams, metrics = batch.batch, {}
    streams["token_level_rewards"] = streams["token_level_scores"]
    if algorithm.kl_in_reward:
        metrics = _subtract_kl(batch, algorithm, state, kl_coef_may_adapt)
    inputs = AdvantageInputs(
        streams["token_level_rewards"],
        streams["response_mask"],
        batch.non_tensor_batch["uid"],
        algorithm,
        scores=streams["token_level_scores"].sum(-1) if algorithm.kl_in_reward else None,
        values=streams["values"] if algorithm.needs_critic else None,
        reward_baselines=streams["reward_baselines"] if algorithm.needs_baselines else None,
    )
    estimate = ADVANTAGE_ESTIMATORS.find(algorithm.adv_estimator)
    streams["advantages"], streams["returns"] = estimate(inputs)
    return metrics


def _subtract_kl(
    batch: DataProto, algorithm: AlgorithmConfig, state: RunState, kl_coef_may_adapt: bool
) -> dict[str, float]:
    streams, kl_coef = batch.batch, state.kl_coef
    if algorithm.full_kl_in_reward:
        kl = streams["ref_kl"]
    else:
        kl = compute_kl(streams["old_log_probs"], streams["ref_log_probs"], algorithm.kl_penalty)
    streams["token_level_rewards"], mean_kl = apply_kl_penalty(
        streams["token_level_scores"], kl, streams["response_mask"], kl_coef
    )
    if algorithm.kl_coef_adapts and kl_coef_may_adapt:
        state.kl_coef = adapt_kl_coef(kl_coef, mean_kl, len(batch), algorithm.kl_target, algorithm.kl_horizon)
    return {"actor/kl_penalty": mean_kl, "actor/kl_coef": kl_coef}
