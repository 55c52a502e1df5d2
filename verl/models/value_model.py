# SPDX-License-Identifier: Apache-2.0
"""A language or image-text model that gives one number for each position instead of a distribution over tokens.

N sequences, S tokens, H hidden size.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class ValueModel(nn.Module):
    """The backbone of a policy with a scalar head in place of its LM head.

    The head starts at zero, whatever the policy was: the first values are all 0, so that the first advantages are the
    rewards themselves, and no gradient of a random head reaches the backbone. Its state dict is the policy's under
    `model.`, and `value_head.{weight,bias}`; no vocabulary head is kept, so none is ever multiplied with.

    Args:
        policy: gives its backbone away and is of no use afterwards.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.model = policy.base_model
        self.config = copy.deepcopy(policy.config)
        self.config.architectures = [type(self).__name__]
        self._no_split_modules = policy._no_split_modules
        hidden_size = self.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden_size, 1, dtype=policy.dtype, device=policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, logits_to_keep: int = 0, **inputs: torch.Tensor) -> TokenClassifierOutput:
        """The value at each position, as `logits` (N, logits_to_keep, 1) float32; of all S positions if that is 0.

        Args:
            logits_to_keep: how many of the last positions to give a value.
            inputs: of the backbone.
        """
        hidden_states = self.model(**inputs).last_hidden_state[:, -logits_to_keep:]  # (N, logits_to_keep, H)
        # In float32 also under mixed precision: bf16 would round values around 1 to steps of 0.004, and what the
        # estimator looks at are differences of neighbours.
        weight, bias = self.value_head.weight.float(), self.value_head.bias.float()
        # The sum is a tensor of its own; `linear` with a bias would return a view, of which FSDP2 warns.
        return TokenClassifierOutput(logits=nn.functional.linear(hidden_states.float(), weight) + bias)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recomputes activations in the backward pass, as `PreTrainedModel` does under this name."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
