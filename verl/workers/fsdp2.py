# SPDX-License-Identifier: Apache-2.0
"""FSDP2: sharding, mixed precision, optimizer and schedule, and offloading between phases."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import get_constant_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup

from verl.models.loader import DTYPES
from verl.workers.actor.config import FSDPConfig, OptimConfig
from verl.workers.adamw_bf16 import AdamWBF16


def build_mesh(device: torch.device, fsdp_size: int = -1) -> DeviceMesh:
    """The ranks over which parameters are sharded: all, in one dimension, or groups of neighbours that are replicas.

    Args:
        fsdp_size: ranks per group; -1, or at least the number of ranks, puts all in one group.
    """
    world_size = dist.get_world_size()
    if not 0 < fsdp_size < world_size:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("fsdp",))
    return init_device_mesh(device.type, (world_size // fsdp_size, fsdp_size), mesh_dim_names=("ddp", "fsdp"))


def shard_model(model: nn.Module, mesh: DeviceMesh, config: FSDPConfig) -> None:
    """Shards the model in place, one group per transformer layer and one for the rest.

    A single worker that computes in the parameters' precision has nothing to gather or cast: the model then only moves
    to the device and is not wrapped.

    With `enable_cpu_offload` on CUDA, shards stay in host memory and each group is fetched when it computes.
    Gradients come out averaged over all ranks, replicas included: a loss that is normalised over all ranks must be
    multiplied by the world size. A model on the meta device stays there until `fill_from_rank0` fills it.
    """
    if _stays_plain(model, mesh, config):
        model.to(mesh.device_type)
        return
    precision = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.mp_param_dtype],
        reduce_dtype=DTYPES[config.mp_reduce_dtype],
        # True would round the vision tower's fp32 rope tables to bf16: logits off by 6e-3.
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if _rests_on_cpu(config, mesh.device_type) else OffloadPolicy()
    shared = dict(mesh=mesh, mp_policy=precision, offload_policy=offload)
    layer_classes = model._no_split_modules
    for module in [module for module in model.modules() if type(module).__name__ in layer_classes]:
        fully_shard(module, reshard_after_forward=config.enable_full_shard, **shared)
    # Set explicitly for the root: by default it stays gathered after a forward without backward, and optimizer state
    # and state dicts then get plain tensors instead of shards.
    fully_shard(model, reshard_after_forward=True, **shared)


def whole_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones once. Call it before sharding, for `fill_from_rank0`.

    Includes buffers that no state dict holds, such as rope frequencies.
    """
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def fill_from_rank0(
    model: nn.Module, whole: Mapping[str, torch.Tensor], config: FSDPConfig, device: torch.device
) -> None:
    """Copies rank 0's values into a sharded model, tensor by tensor; a collective.

    At most one whole tensor is on a rank's device at a time, besides the tensors of rank 0.

    Args:
        model: sharded; on the meta device on the ranks other than 0.
        whole: `whole_tensors` of rank 0; not read on other ranks.
        config: the section that the model was sharded with.
        device: the device of the computation.

    Raises:
        ValueError: this rank's model has other tensors than rank 0's.
    """
    is_source = dist.get_rank() == 0
    if not is_source:
        model.to_empty(device="cpu" if _rests_on_cpu(config, device.type) else device)
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    layouts = {name: (tuple(target.shape), target.dtype) for name, target in targets.items()}
    sent = [layouts]
    dist.broadcast_object_list(sent, src=0)
    if layouts != sent[0]:
        name = next(name for name in {**sent[0], **layouts} if sent[0].get(name) != layouts.get(name))
        raise ValueError(
            f"fsdp.enable_rank0_init=true: {name} is {layouts.get(name)} in the model that is built from its "
            f"configuration and {sent[0].get(name)} in the one read from its files; use fsdp.enable_rank0_init=false"
        )
    for name, (shape, dtype) in sent[0].items():
        value = whole[name].to(device) if is_source else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(value, src=0)
        target = targets[name]
        if isinstance(target, DTensor):
            # Every rank has the whole tensor now: nothing more is sent.
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(value.to_local())
        else:
            target.data = value  # FSDP keeps buffers on the device, even if parameters are on the CPU


def _stays_plain(model: nn.Module, mesh: DeviceMesh, config: FSDPConfig) -> bool:
    """Whether FSDP would not change the model's computation."""
    if mesh.size() > 1 or _rests_on_cpu(config, mesh.device_type):
        return False
    compute_dtype, reduce_dtype = DTYPES[config.mp_param_dtype], DTYPES[config.mp_reduce_dtype]
    # FSDP rounds gradients to the reduction precision on a single worker too.
    keeps_gradients = torch.promote_types(compute_dtype, reduce_dtype) == reduce_dtype
    return keeps_gradients and all(parameter.dtype == compute_dtype for parameter in model.parameters())


def _rests_on_cpu(config: FSDPConfig, device_type: str) -> bool:
    """Whether FSDP offloads shards to host memory; a CPU process has them there anyway."""
    return config.enable_cpu_offload and device_type == "cuda"


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that train.

    Source: Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = dict(lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay)
    if config.strategy == "adamw_bf16":
        return AdamWBF16(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, foreach=True)


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
    """Scales the gradients to a norm of at most `max_norm`; returns the norm before, the same on every rank."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return full_tensor(norm).item()


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor on the computation's device, a collective; returns plain tensors unchanged."""
    # A shard on the CPU would be gathered there, by gloo.
    return value.to(value.device_mesh.device_type).full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def resident(
    device: torch.device,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[None]:
    """Inside, model and optimizer state are on `device`; afterwards on the CPU, also after an exception.

    Pass None for a part that is not offloaded. On a CPU machine nothing moves.
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
