# SPDX-License-Identifier: Apache-2.0
"""The loss of a policy update: the policy loss, weighted per token, and an optional KL loss.

Shapes: N sequences of a micro-batch, R response length.
"""

from functools import partial

import torch

from verl.algorithms.kl import compute_kl
from verl.algorithms.policy_loss import PolicyLoss, PolicyLossInputs
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.utils.attention_token_weights import align_token_weights
from verl.utils.device_copies import to_device
from verl.utils.masked_ops import aggregate_loss
from verl.workers.actor.forward import PolicyForward


class PolicyObjective:
    """The actor's `Objective`.

    Args:
        config: the run's configuration; `worker.actor`, the KL keys of `algorithm` and the switches of both kinds of
            weights are read.
        forward: the policy's forward pass, with a reference if the KL loss is `full`.
        policy_loss: one of `POLICY_LOSSES`.
    """

    def __init__(self, config: PPOConfig, forward: PolicyForward, policy_loss: PolicyLoss) -> None:
        self.config = config.worker.actor
        self.algorithm = config.algorithm
        self.has_importance_weights = config.worker.rollout.importance_cap is not None
        self.forward = forward
        self.policy_loss = policy_loss
        self.wanted = ["log_probs", "entropy"] + (["kl"] if self.algorithm.full_kl_in_loss else [])

    def __call__(
        self, rows: DataProto, num_tokens: torch.Tensor, num_sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reads from `rows`: the model's inputs, `response_mask`, `old_log_probs`, `advantages`; `token_weights`,
        `importance_weights` and `ref_log_probs` (N, R) in runs that have them."""
        self._require_no_idle_weights(rows)
        streams = {name: to_device(rows.batch[name], self.forward.device) for name in self._streams_read()}
        response_mask, old_log_probs = streams["response_mask"], streams["old_log_probs"]  # (N, R)
        weighted_mask = response_mask
        if self.algorithm.enable_token_weights:
            weighted_mask = response_mask * align_token_weights(streams["token_weights"], response_mask)  # (N, R)
        share = partial(
            aggregate_loss,
            response_mask=response_mask,
            num_tokens=to_device(num_tokens, self.forward.device),
            num_sequences=num_sequences,
        )
        share_of_mean = partial(share, weighted_mask=response_mask, mode="token")
        share_of_loss = partial(share, weighted_mask=weighted_mask, mode=self.config.loss_avg_mode)

        measured = self.forward.measure(rows, self.wanted)  # (N, R) each
        policy_loss, per_token_metrics = self.policy_loss(
            PolicyLossInputs(measured["log_probs"], old_log_probs, streams["advantages"], response_mask, self.config)
        )
        if self.has_importance_weights:
            policy_loss = policy_loss * streams["importance_weights"]
        loss = share_of_loss(policy_loss)
        metrics = {
            "pg_loss": loss,
            "ppo_kl": share_of_mean(old_log_probs - measured["log_probs"]),
            "entropy_loss": share_of_mean(measured["entropy"]),
        }
        metrics.update({name: share_of_mean(values) for name, values in per_token_metrics.items()})
        if self.algorithm.kl_in_loss:
            if self.algorithm.full_kl_in_loss:
                kl = measured["kl"]
            else:
                kl = compute_kl(measured["log_probs"], streams["ref_log_probs"], self.algorithm.kl_penalty)
            metrics["kl_loss"] = share_of_loss(kl)
            loss = loss + self.algorithm.kl_coef * metrics["kl_loss"]
        return loss, metrics

    def _streams_read(self) -> list[str]:
        """Names of the streams to read from the batch, besides the model's inputs."""
        names = ["response_mask", "old_log_probs", "advantages"]
        if self.algorithm.enable_token_weights:
            names.append("token_weights")
        if self.has_importance_weights:
            names.append("importance_weights")
        if self.algorithm.kl_in_loss and not self.algorithm.full_kl_in_loss:
            names.append("ref_log_probs")
        return names

    def _require_no_idle_weights(self, rows: DataProto) -> None:
        """Raise if the batch has weights that are switched off: they would be silently ignored."""
        switches = {
            "token_weights": ("algorithm.enable_token_weights=true", self.algorithm.enable_token_weights),
            "importance_weights": ("worker.rollout.importance_cap", self.has_importance_weights),
        }
        for name, (switch, is_on) in switches.items():
            if name in rows.batch.keys() and not is_on:
                raise ValueError(f"the batch has {name}, which take no part in the loss without {switch}")
