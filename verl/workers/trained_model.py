# SPDX-License-Identifier: Apache-2.0
"""The common part of actor and critic: optimizer steps, schedule, checkpoint, offloading.

They differ in the objective, a function that the update calls for each micro-batch.

Shapes: N sequences of this rank, R response length, W ranks.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from verl.models.flops import Work, peak_flops
from verl.protocol import DataProto
from verl.utils.batch_plan import ModelPlan
from verl.workers.actor.config import TrainedModelConfig
from verl.workers.fsdp2 import build_optimizer, build_scheduler, clip_gradients, resident
from verl.workers.fsdp_checkpoint import FSDPCheckpoint, SavesPretrained
from verl.workers.response_forward import ResponseForward

logger = logging.getLogger(__name__)


Objective = Callable[[DataProto, torch.Tensor, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Takes the rows of a micro-batch, and the numbers of response tokens and of sequences in the mini-batch over all
micro-batches and ranks. Returns the micro-batch's share of the mini-batch's loss (a scalar with gradient), and of its
metrics (scalars by name).
"""


class TrainedModel:
    """A model, sharded or whole, with everything for its training.

    Args:
        forward: the model's forward pass.
        objective: the loss of an update.
        config: the model's section, `worker.actor` or `worker.critic`.
        plan: the model's batch sizes.
        training_steps: number of steps of the run, for the learning-rate schedule.
        pretrained_parts: config, tokenizer and so on, which checkpoints hold beside the weights.
    """

    area: str
    """First part of the metrics' names."""

    def __init__(
        self,
        forward: ResponseForward,
        objective: Objective,
        config: TrainedModelConfig,
        plan: ModelPlan,
        training_steps: int,
        pretrained_parts: Sequence[SavesPretrained],
    ) -> None:
        self.forward = forward
        self.objective = objective
        self.config = config
        self.plan = plan
        if config.model.enable_gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.skipped_mini_batches: list[int] = []
        """Indices of skipped mini-batches in the last update, one entry per pass in which the step was skipped."""
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scheduler = build_scheduler(self.optimizer, config.optim, training_steps)
        self.checkpoint = FSDPCheckpoint(self.model, self.optimizer, self.scheduler, pretrained_parts)
        with self.resident():
            pass  # from here on the parameters are where they stay between phases

    @property
    def model(self) -> nn.Module:
        return self.forward.model

    @property
    def ranks_per_row(self) -> int:
        """Number of ranks that share each row and have the same rows."""
        return 1 if self.forward.group is None else self.forward.group.size

    def resident(self, optimizer: bool = False) -> AbstractContextManager:
        """Inside, offloaded parameters are on the device; with `optimizer` also the optimizer's states."""
        offload = self.config.offload
        if self.config.fsdp.enable_cpu_offload:
            return nullcontext()  # FSDP fetches each layer by itself, and the optimizer runs on the CPU
        return resident(
            self.forward.device,
            model=self.model if offload.offload_params else None,
            optimizer=self.optimizer if optimizer and offload.offload_optimizer else None,
        )

    def update(self, data: DataProto) -> dict[str, float]:
        """One pass of optimizer steps over this rank's rows, `ppo_epochs` times; the schedule then advances once.

        The rows are split, in order, into `plan.mini_batches` mini-batches; the k-th pieces of all ranks form one
        optimizer step. Ranks that share rows hold the rows of the whole group, member after member, and split each
        member's part separately. Losses are sums over tokens (or rows) divided by the counts of the whole mini-batch
        over all ranks, so the result depends neither on micro-batches nor on the number of ranks.

        Returns metrics, the same on every rank: the objective's metrics and `grad_norm` before clipping, averaged over
        the optimizer steps; `lr`; and `skipped_steps`, the number of optimizer steps that were skipped because their
        gradient was not finite (the schedule still advances: it counts training steps). By this rank's clock:
        `perf/tflops_*`, 10^12 operations per second and device, without the forwards of a reference; and
        `perf/mfu_*`, their share of the device's peak, if that is known.
        """
        self.model.train()
        self.forward.work = Work()
        start = time.perf_counter()
        steps = []
        self.skipped_mini_batches = []
        for _ in range(self.config.ppo_epochs):
            for number, mini_batch in enumerate(self._mini_batches(data)):
                steps.append(self._optimizer_step(mini_batch))
                if not math.isfinite(steps[-1][f"{self.area}/grad_norm"]):
                    self.skipped_mini_batches.append(number)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        metrics |= {f"{self.area}/lr": learning_rate, f"{self.area}/skipped_steps": len(self.skipped_mini_batches)}
        return {**metrics, **self._throughput(start)}

    def _mini_batches(self, data: DataProto) -> list[DataProto]:
        size = self.plan.sequences_per_rank_per_mini_batch
        by_rank = [rows.split(size) for rows in data.chunk(self.ranks_per_row)]
        return [DataProto.concat(pieces) for pieces in zip(*by_rank, strict=True)]

    def _throughput(self, start: float) -> dict[str, float]:
        work = self._sum_over_rows(torch.tensor(self.forward.work.training)).item()
        device, is_cuda = self.forward.device, self.forward.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(device)
        device_flops = work / dist.get_world_size() / (time.perf_counter() - start)
        metrics = {f"perf/tflops_{self.area}": device_flops / 1e12}
        peak = peak_flops(torch.cuda.get_device_name(device)) if is_cuda else None
        return metrics if peak is None else {**metrics, f"perf/mfu_{self.area}": device_flops / peak}

    def _optimizer_step(self, mini_batch: DataProto) -> dict[str, float]:
        metrics = self.accumulate_gradients(mini_batch)
        grad_norm = clip_gradients(self.model, self.config.max_grad_norm)
        if math.isfinite(grad_norm):
            self.optimizer.step()
        else:
            logger.warning("%s gradient norm is %s: this optimizer step is skipped", self.area, grad_norm)
        self.optimizer.zero_grad()
        return {**metrics, f"{self.area}/grad_norm": grad_norm}

    def accumulate_gradients(self, mini_batch: DataProto) -> dict[str, float]:
        """Computes the gradient of a whole mini-batch's loss into the parameters, and returns its metrics.

        Args:
            mini_batch: this rank's rows; all ranks have the same number of rows.
        """
        world_size = dist.get_world_size()
        num_tokens = self._sum_over_rows(mini_batch.batch["response_mask"].sum())
        num_sequences = len(mini_batch) * world_size // self.ranks_per_row
        micro_batches, _ = self.forward.micro_batches(mini_batch, self.plan.update_micro_batch_size)
        sums: dict[str, torch.Tensor] = {}
        for micro_batch in micro_batches:
            # Gradients are reduced after every micro-batch and summed as shards. FSDP could reduce only after the last
            # one, but would then hold whole gradients on every device: 28 GB of float32 for 7 billion weights.
            loss, parts = self.objective(micro_batch, num_tokens, num_sequences)
            (loss * world_size).backward()  # FSDP averages gradients over the ranks
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        totals = self._sum_over_rows(torch.stack([value.double() for value in sums.values()]))
        return {f"{self.area}/{name}": total for name, total in zip(sums, totals.tolist(), strict=True)}

    def _sum_over_rows(self, value: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks, counting each shared row once."""
        total = value.detach().to(torch.float64).cpu()
        dist.all_reduce(total)
        return total / self.ranks_per_row
