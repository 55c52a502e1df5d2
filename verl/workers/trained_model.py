# SPDX-License-Identifier: Apache-2.0
"""What the actor and the critic have in common: optimizer steps, a schedule, a checkpoint, and a place to rest.

What differs between them is the objective, a function that the update calls for each micro-batch.

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
"""A micro-batch's share of its mini-batch's loss (a scalar with gradient), and of its metrics (scalars by name).

It is called with the rows, and with the numbers of response tokens and of sequences in the mini-batch, over all
micro-batches and ranks.
"""


class TrainedModel:
    """A model, sharded or whole, and all that training it takes.

    Args:
        forward: the model's forward pass.
        objective: what an update minimises.
        config: of the model, `worker.actor` or `worker.critic`.
        plan: its batch numbers.
        training_steps: length of the run, for the learning-rate schedule.
        described_by: what its checkpoints hold beside the weights to say which model this is.
    """

    area: str
    """First part of the names of its metrics."""

    def __init__(
        self,
        forward: ResponseForward,
        objective: Objective,
        config: TrainedModelConfig,
        plan: ModelPlan,
        training_steps: int,
        described_by: Sequence[SavesPretrained],
    ) -> None:
        self.forward = forward
        self.objective = objective
        self.config = config
        self.plan = plan
        if config.model.enable_gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.skipped_mini_batches: list[int] = []
        """Of the last update, by their place in it, a place for each pass in which its step was skipped."""
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scheduler = build_scheduler(self.optimizer, config.optim, training_steps)
        self.checkpoint = FSDPCheckpoint(self.model, self.optimizer, self.scheduler, described_by)
        with self.resident():
            pass  # from here on the parameters rest where they do between phases

    @property
    def model(self) -> nn.Module:
        return self.forward.model

    @property
    def ranks_per_row(self) -> int:
        """How many ranks share each row, and have the same rows."""
        return 1 if self.forward.group is None else self.forward.group.size

    def resident(self, optimizer: bool = False) -> AbstractContextManager:
        """Holds what `config.offload` sends to the CPU between phases on the device: parameters, on request states."""
        offload = self.config.offload
        if self.config.fsdp.enable_cpu_offload:
            return nullcontext()  # FSDP fetches each layer by itself, and the optimizer works on the CPU
        return resident(
            self.forward.device,
            model=self.model if offload.offload_params else None,
            optimizer=self.optimizer if optimizer and offload.offload_optimizer else None,
        )

    def update(self, data: DataProto) -> dict[str, float]:
        """One pass of optimizer steps over this rank's rows, `ppo_epochs` times; the schedule then advances once.

        The rows are cut, in order, into `plan.mini_batches` mini-batches; row i of every rank's k-th piece belongs to
        the same optimizer step. Ranks that share rows hold the rows of all of them, one member's after the other's,
        and cut each member's part for itself. Losses are sums over tokens (or rows) divided by the counts of the whole
        mini-batch over all ranks, so the result depends neither on micro-batches nor on the number of ranks.

        Returns metrics, the same on every rank: the objective's own, `grad_norm` before clipping, averaged over the
        optimizer steps, `lr`, and `skipped_steps`, how many optimizer steps were left out because their gradient was
        not finite (the schedule advances all the same: it counts training steps); by this rank's clock
        `perf/tflops_*`, the operations in 10^12 that a device did in a second (those of a reference do not count), and
        `perf/mfu_*`, their share of what it is made for, where that is known.
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
        of_device = work / dist.get_world_size() / (time.perf_counter() - start)
        metrics = {f"perf/tflops_{self.area}": of_device / 1e12}
        peak = peak_flops(torch.cuda.get_device_name(device)) if is_cuda else None
        return metrics if peak is None else {**metrics, f"perf/mfu_{self.area}": of_device / peak}

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
        """Leaves the gradient of the whole mini-batch's loss on the parameters, and returns its metrics.

        Args:
            mini_batch: this rank's rows of it; all ranks have as many rows.
        """
        world_size = dist.get_world_size()
        num_tokens = self._sum_over_rows(mini_batch.batch["response_mask"].sum())
        num_sequences = len(mini_batch) * world_size // self.ranks_per_row
        micro_batches, _ = self.forward.micro_batches(mini_batch, self.plan.update_micro_batch_size)
        sums: dict[str, torch.Tensor] = {}
        for micro_batch in micro_batches:
            # Gradients are reduced after every one of them, and add up in shards. Kept back until the last, as FSDP
            # can, they would stand whole on every device: 28 GB of float32 for 7 billion weights.
            loss, parts = self.objective(micro_batch, num_tokens, num_sequences)
            (loss * world_size).backward()  # FSDP averages gradients over the ranks
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        totals = self._sum_over_rows(torch.stack([value.double() for value in sums.values()]))
        return {f"{self.area}/{name}": total for name, total in zip(sums, totals.tolist(), strict=True)}

    def _sum_over_rows(self, value: torch.Tensor) -> torch.Tensor:
        """Over all ranks, each row counted once."""
        total = value.detach().to(torch.float64).cpu()
        dist.all_reduce(total)
        return total / self.ranks_per_row
