# SPDX-License-Identifier: Apache-2.0
"""Streams the sharded policy's weights out, tensor by tensor, for a rollout engine to take in."""

from collections.abc import Iterator

import torch
from torch import nn

from verl.workers.fsdp2 import full_tensor


def stream_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, whole tensor) for every entry of the state dict, tied ones under each name.

    A collective: every rank has to draw the stream to its end, in step. At most one tensor is whole at a time, beside
    what the consumer keeps. Tensors may alias the live parameters (at world size 1 they do): copy, don't keep.
    """
    for name, value in model.state_dict().items():
        yield name, full_tensor(value).detach()
