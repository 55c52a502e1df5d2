# SPDX-License-Identifier: Apache-2.0
"""The data-parallel actor: log-probabilities of a rank's rows, and the policy update over all ranks.

Shapes: N sequences of this rank, R response length, W ranks.
"""

import logging
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from verl.algorithms.kl import compute_kl
from verl.algorithms.policy_loss import POLICY_LOSSES, PolicyLossInputs
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.utils.attention_metrics import KeyVocabulary
from verl.utils.attention_token_weights import align_token_weights
from verl.utils.batch_plan import BatchPlan
from verl.utils.masked_ops import aggregate_loss
from verl.workers.actor.forward import PolicyForward
from verl.workers.fsdp2 import clip_gradients

logger = logging.getLogger(__name__)


def compute_log_probs(forward: PolicyForward, data: DataProto, micro_batch_size: int) -> torch.Tensor:
    """(N, R) float32 on the CPU: log-probabilities of the responses, without gradient.

    Rows go through in micro-batches, the last one smaller if need be; all ranks have as many rows.
    """
    forward.model.eval()
    with torch.no_grad():
        return torch.cat([forward(rows).cpu() for rows in _micro_batches(data, micro_batch_size)])


def compute_log_probs_and_attention(
    forward: PolicyForward,
    data: DataProto,
    micro_batch_size: int,
    vocabulary: KeyVocabulary,
    last_k_layers: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `compute_log_probs` does, and from the same passes (N, R, 2) attention mass and (N, 2) numbers of keys.

    See `PolicyForward.with_attention` for the two and for what it raises.
    """
    forward.model.eval()
    with torch.no_grad():
        parts = [
            forward.with_attention(rows, vocabulary, last_k_layers) for rows in _micro_batches(data, micro_batch_size)
        ]
    log_probs, mass, keys = (torch.cat([part.cpu() for part in stream]) for stream in zip(*parts, strict=True))
    return log_probs, mass, keys


def compute_kl_to_reference(
    forward: PolicyForward, reference: PolicyForward, data: DataProto, micro_batch_size: int
) -> torch.Tensor:
    """(N, R) float32 on the CPU: KL(policy || reference) over the whole vocabulary, without gradient.

    Both run on each micro-batch in turn.
    """
    forward.model.eval()
    with torch.no_grad():
        parts = [forward.statistics(rows, reference).kl for rows in _micro_batches(data, micro_batch_size)]
    return torch.cat([part.cpu() for part in parts])


def _micro_batches(data: DataProto, size: int) -> Iterator[DataProto]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


class DataParallelPPOActor:
    """Updates the sharded policy with a clipped policy gradient, and a KL loss where one is asked for.

    Args:
        config: of the run; `worker.actor` and the KL keys of `algorithm` are read.
        plan: the run's batch numbers.
        forward: the policy's forward pass.
        optimizer, scheduler: the scheduler advances once per call of `update_policy`.
        reference: the frozen policy's forward pass, for a KL loss over the whole vocabulary; None where there is none.
    """

    def __init__(
        self,
        config: PPOConfig,
        plan: BatchPlan,
        forward: PolicyForward,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        reference: PolicyForward | None = None,
    ) -> None:
        self.config = config.worker.actor
        self.algorithm = config.algorithm
        self.plan = plan
        self.forward = forward
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.reference = reference

    def update_policy(self, data: DataProto) -> dict[str, float]:
        """One pass of optimizer steps over this rank's rows, `ppo_epochs` times.

        The rows are cut, in order, into `plan.mini_batches` mini-batches; row i of every rank's k-th piece belongs to
        the same optimizer step. Losses are sums over tokens (or rows) divided by the counts of the whole mini-batch
        over all ranks, so the result depends neither on micro-batches nor on the number of ranks.

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
            estimates the KL from the policy that made the rollout.
        """
        self.forward.model.train()
        steps = []
        for _ in range(self.config.ppo_epochs):
            for mini_batch in data.split(self.plan.sequences_per_rank_per_mini_batch):
                steps.append(self._optimizer_step(mini_batch))
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        metrics["actor/lr"] = learning_rate
        if self.algorithm.kl_in_loss:
            metrics["actor/kl_coef"] = self.algorithm.kl_coef
        return metrics

    def _optimizer_step(self, mini_batch: DataProto) -> dict[str, float]:
        metrics = self.accumulate_gradients(mini_batch)
        grad_norm = clip_gradients(self.forward.model, self.config.max_grad_norm)
        if math.isfinite(grad_norm):
            self.optimizer.step()
        else:
            logger.warning("gradient norm is %s: this optimizer step is skipped", grad_norm)
        self.optimizer.zero_grad()
        return {**metrics, "actor/grad_norm": grad_norm}

    def accumulate_gradients(self, mini_batch: DataProto) -> dict[str, float]:
        """Leaves the gradient of the whole mini-batch's loss on the parameters, and returns its metrics.

        Args:
            mini_batch: this rank's rows of it; all ranks have as many rows.
        """
        world_size = dist.get_world_size()
        num_tokens = _sum_over_ranks(mini_batch.batch["response_mask"].sum())
        num_sequences = len(mini_batch) * world_size
        micro_batches = mini_batch.split(self.plan.update_micro_batch_size)
        sums: dict[str, torch.Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            self.forward.model.set_requires_gradient_sync(index == len(micro_batches) - 1)
            loss, parts = self._loss(micro_batch, num_tokens, num_sequences)
            (loss * world_size).backward()  # FSDP averages gradients over the ranks
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        return {f"actor/{name}": _sum_over_ranks(value).item() for name, value in sums.items()}

    def _loss(
        self, rows: DataProto, num_tokens: torch.Tensor, num_sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This micro-batch's share of the mini-batch's loss, and of its metrics."""
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
        policy_loss, per_token_metrics = POLICY_LOSSES[self.config.loss_type](
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


def _sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    total = value.detach().to(torch.float64).cpu()
    dist.all_reduce(total)
    return total
