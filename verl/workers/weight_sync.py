# SPDX-License-Identifier: Apache-2.0
"""Streams the policy's weights, tensor by tensor, to a rollout engine."""

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from verl.models.trainable import ADAPTER
from verl.workers.fsdp2 import full_tensor


@torch.no_grad()
def stream_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, whole tensor) for every entry of the state dict, tied ones under each name.

    Low-rank adapters are merged into their weights, in the adapters' precision and under the names of the model
    without adapters.

    A collective: every rank must consume the whole stream, in step. At most one tensor is whole at a time, besides the
    tensors that the consumer keeps. Tensors may alias the live parameters (at world size 1 they do), so copy them.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, value in model.state_dict().items():
        owner, _, parameter = name.rpartition(".base_layer.")
        if owner in adapted:
            value = full_tensor(value)
            if parameter == "weight":
                value = value + full_tensor(adapted[owner].get_delta_weight(ADAPTER))
            yield f"{owner}.{parameter}", value.detach()
        elif not any(name.startswith(f"{adapter}.") for adapter in adapted):
            yield name, full_tensor(value).detach()
