# SPDX-License-Identifier: Apache-2.0
"""What of a model trains: all of it, all but its vision tower, or low-rank adapters on its linear layers alone."""

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
"""The name that peft gives a layer's adapter, of which there is one here."""
ALL_LAYERS = "all-linear"
TOWER_NAMES = ("visual", "vision_tower")
"""What families call their vision tower."""


def choose_trainable(model: nn.Module, config: ModelConfig) -> None:
    """Freezes what shall stay as it is and puts in the adapters that shall train, in place; call it before sharding.

    Source of the adapters: Hu et al., arXiv 2106.09685, section 4.1, in peft's implementation. A layer computes
    W x + (alpha / rank) B A x with W frozen. B begins at zero, so that the model begins as it was. Deltas: 1. A begins
    uniform instead of Gaussian, as in peft. 2. The adapters are float32 whatever W is stored in.

    They sit inside the model's own layers and nothing is wrapped around the model: its class, its parts and the names
    of its other weights stay what they were (those of an adapted layer move under `base_layer.`).

    Args:
        model: a policy, or a value model without adapters.
        config: of the model; `freeze_vision_tower` and `lora` are read. A frozen tower gets no adapter either.

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
        # Each rank keeps its part of a whole model that it makes itself: all have to draw the same one.
        torch.default_generator.manual_seed(0)
        inject_adapter_in_model(adapter, model, ADAPTER)
    cast_adapter_dtype(model, ADAPTER)


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The part of a policy or value model that turns pixels into features; None where images do not enter."""
    if not family_of(model.config).has_vision_tower:
        return None
    return next(getattr(model.model, name) for name in TOWER_NAMES if hasattr(model.model, name))


def adapter_config(model: nn.Module) -> LoraConfig | None:
    """How the model's adapters were made; None if it has none."""
    return getattr(model, "peft_config", {}).get(ADAPTER)


def without_adapters(model: nn.Module) -> AbstractContextManager:
    """Inside, the model computes with its frozen weights alone, as it did before anything was trained.

    The adapters then count nothing, exactly. Their own switch in peft would also take their gradient away and give it
    back, which reaches either the gathered or the sharded parameters of a layer under FSDP2, not both.
    """
    return rescale_adapter_scale(model, 0)


def _layers_to_adapt(model: PreTrainedModel, config: ModelConfig, frozen: nn.Module | None) -> list[str]:
    """Names of the linear layers that the targets name and the exclusion does not; never the output head.

    A head may share its weight with the embedding, and an adapter on it would then set the two apart.
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
