# SPDX-License-Identifier: Apache-2.0
"""The data-parallel actor: the policy update over all ranks.

Shapes: N sequences of this rank, R response length.
"""

from collections.abc import Sequence

from verl.algorithms.policy_loss import PolicyLoss
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.utils.batch_plan import BatchPlan
from verl.workers.actor.forward import PolicyForward
from verl.workers.actor.objective import PolicyObjective
from verl.workers.fsdp_checkpoint import SavesPretrained
from verl.workers.trained_model import TrainedModel


class DataParallelPPOActor(TrainedModel):
    """Updates the policy with a policy gradient and an optional KL loss.

    Args:
        config: the run's configuration.
        plan: the run's batch plan.
        forward: the policy's forward pass.
        policy_loss: one of `POLICY_LOSSES`.
        training_steps, pretrained_parts: as in `TrainedModel`.
    """

    area = "actor"
    objective: PolicyObjective

    def __init__(
        self,
        config: PPOConfig,
        plan: BatchPlan,
        forward: PolicyForward,
        policy_loss: PolicyLoss,
        training_steps: int,
        pretrained_parts: Sequence[SavesPretrained],
    ) -> None:
        objective = PolicyObjective(config, forward, policy_loss)
        super().__init__(forward, objective, config.worker.actor, plan.actor, training_steps, pretrained_parts)
        self.algorithm = config.algorithm

    def update_policy(self, data: DataProto) -> dict[str, float]:
        """`TrainedModel.update` on the policy's objective.

        Args:
            data: `input_ids`, `attention_mask`, `position_ids`, `response_mask`, `old_log_probs`, `advantages`;
                non-tensor `multi_modal_data`, and `uid` if packed rows share prompts. With a KL loss other than
                `full`, which runs the reference itself, also `ref_log_probs`. With `algorithm.enable_token_weights`
                also `token_weights` (N, R): each token's policy and KL loss is multiplied by its weight; if it has
                fewer columns than R, the other tokens weigh 1. The weights have no other effect, and losses are
                divided by plain counts, so weights of one change nothing, bit for bit. With
                `worker.rollout.importance_cap` also `importance_weights` (N, R), which multiply only the policy loss.

        Returns:
            `actor/*` metrics, the same on every rank: means over the mini-batch's real response tokens, averaged
            over the optimizer steps. Losses include the token weights; `entropy_loss` is the entropy of the sampling
            distribution; `ppo_kl` is the mean of old minus new log-probability, an estimate of the KL from the policy
            before the update.
        """
        metrics = self.update(data)
        if self.algorithm.kl_in_loss:
            metrics["actor/kl_coef"] = self.algorithm.kl_coef
        return metrics
