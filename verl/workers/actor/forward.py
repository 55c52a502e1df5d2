# SPDX-License-Identifier: Apache-2.0
"""The forward pass of training: log-probabilities of the response tokens, and nothing of the prompt's logits.

On request the same pass measures how much each response token attends to the prompt's text and to its images, or how
uncertain the policy was and how far from its reference.

Shapes: N sequences, P prompt length, R response length, S = P + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from transformers import ProcessorMixin

from verl.models.attention_recorder import record_attention_mass
from verl.models.trainable import without_adapters
from verl.protocol import DataProto
from verl.utils.attention_metrics import KeyVocabulary, count_keys
from verl.utils.logprobs import TokenStatistics, log_probs_from_logits, token_statistics
from verl.workers.response_forward import ResponseForward, filled_columns


class PolicyForward(ResponseForward):
    """Response log-probabilities under one model, with the temperature and the support that sampling used.

    Args:
        model: the sharded policy or reference.
        processor: turns images to features; None for text models.
        temperature: of the rollout; logits are divided by it.
        banned_token_ids: tokens that cannot be sampled; they have probability zero here too.
        device: of the computation.
        is_base: runs the model without its adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin | None,
        temperature: float,
        banned_token_ids: Sequence[int],
        device: torch.device,
        is_base: bool = False,
    ) -> None:
        super().__init__(model, processor, device)
        self.temperature = temperature
        self.banned_token_ids = banned_token_ids
        self.is_base = is_base

    def __call__(self, rows: DataProto) -> torch.Tensor:
        """(N, R) float32 log-probabilities of `responses`, zero outside `response_mask`; see the base class."""
        logits, responses = self._logits(rows)
        log_probs = log_probs_from_logits(logits, responses, self.temperature, self.banned_token_ids)
        return self.as_stream(log_probs, rows)

    def statistics(self, rows: DataProto, reference: PolicyForward | None = None) -> TokenStatistics:
        """The log-probabilities, and from the same forward the entropy and the KL from `reference`.

        Args:
            rows: as for a plain call.
            reference: runs on the same rows, without gradient; None for no KL.

        Returns:
            (N, R) float32 each, zero outside `response_mask`; the entropy has no gradient.
        """
        ref_logits = None
        if reference is not None:
            with torch.no_grad():
                ref_logits, _ = reference._logits(rows)
        logits, responses = self._logits(rows)
        found = token_statistics(logits, responses, self.temperature, self.banned_token_ids, ref_logits)
        kl = None if found.kl is None else self.as_stream(found.kl, rows)
        return TokenStatistics(self.as_stream(found.log_probs, rows), self.as_stream(found.entropy, rows), kl)

    def _logits(self, rows: DataProto) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, length, V) and the responses (N, length) they predict, length being the longest response's."""
        with without_adapters(self.model) if self.is_base else nullcontext():
            logits = self.outputs(rows)
        return logits, rows.batch["responses"][:, : logits.shape[1]].to(self.device)

    def with_attention(
        self, rows: DataProto, vocabulary: KeyVocabulary, last_k_layers: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The log-probabilities, and the attention with which the model gave them, from one forward.

        Args:
            rows: as for a plain call.
            vocabulary: tells the prompt's text from its images.
            last_k_layers: measure this many of the last full-attention layers; None measures all.

        Returns:
            (N, R) float32 log-probabilities, as a plain call returns them; (N, R, 2) float32 attention mass on the
            instruction text and on the images, zero outside `response_mask`; (N, 2) int64 number of keys of the two
            kinds.

        Raises:
            RuntimeError: a layer's attention could not be measured.
        """
        columns, length = filled_columns(rows)
        full_length = rows.batch["response_mask"].shape[1]
        key_kinds = vocabulary.classify(rows.batch["input_ids"], rows.batch["attention_mask"], full_length)  # (N, S)
        with record_attention_mass(self.model, key_kinds[:, columns], length, last_k_layers) as recorder:
            log_probs = self(rows)
        mass = nn.functional.pad(recorder.mass(), (0, 0, 0, full_length - length))  # (N, R, 2)
        return log_probs, mass, count_keys(key_kinds)
