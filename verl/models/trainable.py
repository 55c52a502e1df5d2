# SPDX-License-Identifier: Apache-2.0
"""Chooses what trains: the whole model, all but its vision tower, or only low-rank adapters on linear layers."""

import re
from contextlib import AbstractContextManager

import torch
from peft import LoraConfig
from peft.functional import cast_adapter_dtype, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import PreTrainedModel

from verl.models.registry import family_of
from verl.workers.actor.config import ModelConfig

ADAPTER = "default"
"""peft's name for a layer's adapter; each layer has only one."""
ALL_LAYERS = "all-linear"
TOWER_NAMES = ("visual", "vision_tower")
"""Attribute names of vision towers."""


def choose_trainable(model: nn.Module, config: ModelConfig) -> None:
    """Freezes weights and adds adapters in place, as configured; call it before sharding.

    Source of the adapters: Hu et al., arXiv 2106.09685, section 4.1, in peft's implementation. A layer computes
    W x + (alpha / rank) B A x with W frozen. B begins at zero, so that the model begins as it was. Deltas: 1. A begins
    uniform instead of Gaussian, as in peft. 2. The adapters are float32 whatever W is stored in.

    The adapters are inside the model's layers, and the model is not wrapped: its class, its modules and the names of
    its other weights do not change, except that an adapted layer's weights move under `base_layer.`.

    Args:
        model: a policy, or a value model without adapters.
        config: the model's section; `freeze_vision_tower` and `lora` are read. A frozen tower gets no adapters.

    Raises:
        ValueError: a target names no linear layer, or no layer is left to adapt.
    """
    tower = vision_tower(model) if config.freeze_vision_tower else None
    if tower is not None:
        tower.requires_grad_(False)
    if config.lora.rank == 0:
        return
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=_layers_to_adapt(model, config, frozen=tower),
        base_model_name_or_path=config.model_path,
    )
    with torch.random.fork_rng(devices=[]):
        # Each rank builds the whole model and keeps its shard, so all ranks must draw the same adapters.
        torch.default_generator.manual_seed(0)
        inject_adapter_in_model(adapter, model, ADAPTER)
    cast_adapter_dtype(model, ADAPTER)


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The module of a policy or value model that turns pixels into features; None for a text-only model."""
    if not family_of(model.config).has_vision_tower:
        return None
    return next(getattr(model.model, name) for name in TOWER_NAMES if hasattr(model.model, name))


def adapter_config(model: nn.Module) -> LoraConfig | None:
    """peft's config of the model's adapters; None if it has none."""
    return getattr(model, "peft_config", {}).get(ADAPTER)


def without_adapters(model: nn.Module) -> AbstractContextManager:
    """Inside, the model computes with its frozen weights only, as before training.

    The adapters then contribute exactly nothing. peft's own switch would also toggle `requires_grad`, which under
    FSDP2 reaches either the gathered or the sharded parameters of a layer, not both.
    """
    return rescale_adapter_scale(model, 0)


def _layers_to_adapt(model: PreTrainedModel, config: ModelConfig, frozen: nn.Module | None) -> list[str]:
    """Names of the linear layers that match the targets and not the exclusion; never the output head.

    The head may share its weight with the embedding, and an adapter on it would break the tie.
    """
    section = "worker.actor.model.lora"
    untouched = {model.get_output_embeddings(), *(frozen.modules() if frozen is not None else ())}
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module not in untouched
    ]
    targets = config.lora.target_modules
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        named = [name for name in linear if target == ALL_LAYERS or f".{name}".endswith(f".{target}")]
        if not named:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"{section}.target_modules names {target!r}, but no linear layer of {config.model_path} that can have "
                f"an adapter ends in it; use {ALL_LAYERS} or names out of {', '.join(known)}"
            )
        chosen.update(named)
    exclude = config.lora.exclude_modules
    left = [name for name in linear if name in chosen and not (exclude and re.fullmatch(exclude, name))]
    if not left:
        raise ValueError(
            f"{section}.exclude_modules={exclude} leaves none of the layers that {section}.target_modules={targets} "
            "names; it is a regular expression of whole names of modules, such as .*visual.*"
        )
    return left
