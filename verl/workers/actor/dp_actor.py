# SPDX-License-Identifier: Apache-2.0
"""The data-parallel actor: the policy update over all ranks.

Shapes: N sequences of this rank, R response length, W ranks.
"""

from collections.abc import Sequence

import torch

from verl.algorithms.kl import compute_kl
from verl.algorithms.policy_loss import PolicyLoss, PolicyLossInputs
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.utils.attention_token_weights import align_token_weights
from verl.utils.batch_plan import BatchPlan
from verl.utils.masked_ops import aggregate_loss
from verl.workers.actor.config import ActorConfig
from verl.workers.actor.forward import PolicyForward
from verl.workers.fsdp_checkpoint import SavesPretrained
from verl.workers.trained_model import TrainedModel


class DataParallelPPOActor(TrainedModel):
    """Updates the sharded policy with a policy gradient, and a KL loss where one is asked for.

    Args:
        config: of the run; `worker.actor` and the KL keys of `algorithm` are read.
        plan: the run's batch numbers.
        forward: the policy's forward pass.
        policy_loss: one of `POLICY_LOSSES`.
        training_steps, described_by: as in `TrainedModel`.
        reference: the frozen policy's forward pass, for a KL loss over the whole vocabulary; None where there is none.
    """

    area = "actor"
    config: ActorConfig

    def __init__(
        self,
        config: PPOConfig,
        plan: BatchPlan,
        forward: PolicyForward,
        policy_loss: PolicyLoss,
        training_steps: int,
        described_by: Sequence[SavesPretrained],
        reference: PolicyForward | None = None,
    ) -> None:
        super().__init__(forward, config.worker.actor, plan.actor, training_steps, described_by)
        self.algorithm = config.algorithm
        self.policy_loss = policy_loss
        self.reference = reference

    def update_policy(self, data: DataProto) -> dict[str, float]:
        """`TrainedModel.update` on the policy loss.

        Args:
            data: `input_ids`, `attention_mask`, `position_ids`, `responses`, `response_mask`, `old_log_probs`,
                `advantages`, and `ref_log_probs` with a KL loss other than `full`, which runs the reference itself;
                non-tensor `multi_modal_data`. Also, if the tokens shall not count alike, `token_weights` (N, any
                length): each token's policy and KL loss is multiplied by its weight; tokens beyond the given ones
                weigh 1. Nothing else sees the weights, and losses are divided by plain counts, so that weights of one
                change nothing, bit for bit. `importance_weights` (N, R), if there are any, multiply the policy loss
                alone.

        Returns:
            `actor/*` metrics, the same on every rank: means over the mini-batch's real response tokens, averaged
            over the optimizer steps. Losses are the weighted ones that were trained on; `entropy_loss` is the entropy
            of the distribution that is sampled from, `ppo_kl` the mean of old less new log-probability, which
            estimates the KL from the policy before the update.
        """
        metrics = self.update(data)
        if self.algorithm.kl_in_loss:
            metrics["actor/kl_coef"] = self.algorithm.kl_coef
        return metrics

    def _loss(
        self, rows: DataProto, num_tokens: torch.Tensor, num_sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        device = self.forward.device
        response_mask = rows.batch["response_mask"].to(device)  # (N, R)
        loss_weights = response_mask
        if "token_weights" in rows.batch.keys():
            loss_weights = response_mask * align_token_weights(rows.batch["token_weights"], response_mask)
        old_log_probs = rows.batch["old_log_probs"].to(device)
        num_tokens = num_tokens.to(device)

        def share(per_token: torch.Tensor) -> torch.Tensor:
            return aggregate_loss(per_token, response_mask, response_mask, "token", num_tokens, num_sequences)

        def share_of_loss(per_token: torch.Tensor) -> torch.Tensor:
            mode = self.config.loss_avg_mode
            return aggregate_loss(per_token, loss_weights, response_mask, mode, num_tokens, num_sequences)

        found = self.forward.statistics(rows, self.reference)
        policy_loss, per_token_metrics = self.policy_loss(
            PolicyLossInputs(
                found.log_probs,
                old_log_probs,
                rows.batch["advantages"].to(device),
                response_mask,
                clip_ratio_low=self.config.clip_ratio_low,
                clip_ratio_high=self.config.clip_ratio_high,
                clip_ratio_dual=self.config.clip_ratio_dual,
                tau_positive=self.config.tau_positive,
                tau_negative=self.config.tau_negative,
            )
        )
        if "importance_weights" in rows.batch.keys():
            policy_loss = policy_loss * rows.batch["importance_weights"].to(device)
        loss = share_of_loss(policy_loss)
        parts = {
            "pg_loss": loss,
            "ppo_kl": share(old_log_probs - found.log_probs),
            "entropy_loss": share(found.entropy),
        }
        parts.update({name: share(values) for name, values in per_token_metrics.items()})
        if self.algorithm.kl_in_loss:
            kl = found.kl
            if kl is None:
                ref_log_probs = rows.batch["ref_log_probs"].to(device)
                kl = compute_kl(found.log_probs, ref_log_probs, self.algorithm.kl_penalty)
            kl_loss = share_of_loss(kl)
            loss = loss + self.algorithm.kl_coef * kl_loss
            parts["kl_loss"] = kl_loss
        return loss, parts
