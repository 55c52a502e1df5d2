# SPDX-License-Identifier: Apache-2.0
"""FSDP2 mechanics: sharding, mixed precision, optimizer and schedule, and where parameters rest between phases."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import get_constant_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup

from verl.models.loader import DTYPES
from verl.workers.actor.config import FSDPConfig, OptimConfig


def build_mesh(device: torch.device) -> DeviceMesh:
    """All ranks in one dimension, over which parameters are sharded."""
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))


def shard_model(model: nn.Module, mesh: DeviceMesh, config: FSDPConfig) -> None:
    """Shards the model in place, one group per transformer layer and one for the rest.

    With `enable_cpu_offload` on CUDA, shards rest in host memory and each group is fetched when it computes.
    Gradients come out averaged over the ranks: a loss that is normalised over all ranks has to be multiplied by the
    world size.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.mp_param_dtype],
        reduce_dtype=DTYPES[config.mp_reduce_dtype],
        # True would round the vision tower's fp32 rope tables to bf16: logits off by 6e-3.
        cast_forward_inputs=False,
    )
    # In a CPU process parameters are in host memory anyway.
    offloads = config.enable_cpu_offload and mesh.device_type == "cuda"
    shared = dict(mesh=mesh, mp_policy=precision, offload_policy=CPUOffloadPolicy() if offloads else OffloadPolicy())
    layer_classes = model._no_split_modules
    for module in [module for module in model.modules() if type(module).__name__ in layer_classes]:
        fully_shard(module, reshard_after_forward=config.enable_full_shard, **shared)
    # Said outright for the root: its default leaves it gathered after a forward without backward, and optimizer
    # state and state dicts then meet plain tensors where they expect shards.
    fully_shard(model, reshard_after_forward=True, **shared)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that train.

    Source: Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay, foreach=True
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Constant or cosine, after a linear warm-up from zero; advanced once per training step.

    Warm-up lasts `lr_warmup_steps` if given, else `lr_warmup_ratio * training_steps`, rounded down.
    """
    warmup_steps = config.lr_warmup_steps
    if warmup_steps is None:
        warmup_steps = int(config.lr_warmup_ratio * training_steps)
    if config.lr_scheduler_type == "constant":
        return get_constant_schedule_with_warmup(optimizer, num_warmup_steps=warmup_steps)
    assert config.lr_scheduler_type == "cosine"
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=training_steps,
        min_lr_rate=config.min_lr_ratio or 0.0,
    )


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scales the gradients to `max_norm` at most; returns the norm before, the same on every rank."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return full_tensor(norm).item()


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a shard, a collective; a plain tensor as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def resident(
    device: torch.device,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[None]:
    """Holds the given model and optimizer state on `device` inside, and on the CPU after, also after an exception.

    Pass None for what is not offloaded. On a CPU machine nothing moves.
    """
    _move(model, optimizer, device)
    try:
        yield
    finally:
        _move(model, optimizer, torch.device("cpu"))
        if device.type == "cuda" and (model is not None or optimizer is not None):
            torch.cuda.empty_cache()


def _move(model: nn.Module | None, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
    if model is not None:
        model.to(device)
    if optimizer is not None:
        for state in optimizer.state.values():
            for name, value in state.items():
                # AdamW keeps its step counts on the CPU by design.
                if isinstance(value, torch.Tensor) and name != "step":
                    state[name] = value.to(device)
