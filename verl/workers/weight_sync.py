# SPDX-License-Identifier: Apache-2.0
"""Streams the sharded policy's weights out, tensor by tensor, for a rollout engine to take in."""

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from verl.workers.fsdp2 import full_tensor


def stream_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, whole tensor) for every entry of the state dict, tied ones under each name.

    Low-rank adapters of peft come merged into the weights that they adapt, under the names of the model without them.

    A collective: every rank has to draw the stream to its end, in step. At most one tensor is whole at a time, beside
    what the consumer keeps. Tensors may alias the live parameters (at world size 1 they do): copy, don't keep.
    """
    if isinstance(model, PeftModel):
        yield from _stream_merged_weights(model.get_base_model())
        return
    for name, value in model.state_dict().items():
        yield name, full_tensor(value).detach()


@torch.no_grad()
def _stream_merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, value in model.state_dict().items():
        owner, _, parameter = name.rpartition(".base_layer.")
        if owner in adapted:
            value = full_tensor(value)
            if parameter == "weight":
                value = value + _update_of(adapted[owner], value)
            yield f"{owner}.{parameter}", value.detach()
        elif not any(name.startswith(f"{adapter}.") for adapter in adapted):
            yield name, full_tensor(value).detach()


def _update_of(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """What the active adapters add to the weight, (out, in) like it."""
    update = torch.zeros_like(weight)
    for adapter in layer.active_adapters:
        update += full_tensor(layer.get_delta_weight(adapter)).to(weight)
    return update
