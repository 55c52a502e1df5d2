# SPDX-License-Identifier: Apache-2.0
"""A language or image-text model that gives one number for each position instead of a distribution over tokens.

N sequences, S tokens, H hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class ValueModel(nn.Module):
    """A policy's backbone with a scalar head in place of the LM head.

    The head starts at zero for every policy: the first values are all 0, so the first advantages are the rewards
    themselves, and no gradient of a random head reaches the backbone. The state dict has the policy's weights under
    `model.`, and `value_head.{weight,bias}`. There is no LM head.

    Args:
        policy: gives up its backbone and cannot be used afterwards.
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

    def get_decoder(self) -> nn.Module:
        """The language model, as in `PreTrainedModel`."""
        return self.model.get_decoder()

    def get_output_embeddings(self) -> None:
        """None, as in a `PreTrainedModel` without LM head."""

    def forward(self, logits_to_keep: int | torch.Tensor = 0, **inputs: Any) -> TokenClassifierOutput:
        """The values at the k kept positions, as `logits` (N, k, 1) float32.

        Args:
            logits_to_keep: the number of last positions to keep, 0 for all; or the positions (k,).
            inputs: keyword arguments of the backbone.
        """
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = self.model(**inputs).last_hidden_state[:, kept]  # (N, k, H)
        # In float32 also under mixed precision: bf16 would round values around 1 to steps of 0.004, and the estimator
        # uses differences of neighbouring values.
        weight, bias = self.value_head.weight.float(), self.value_head.bias.float()
        # The sum is a new tensor; `linear` with a bias would return a view, and FSDP2 warns about views.
        return TokenClassifierOutput(logits=nn.functional.linear(hidden_states.float(), weight) + bias)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recomputes activations in the backward pass, as in `PreTrainedModel`."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
