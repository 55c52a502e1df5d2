# SPDX-License-Identifier: Apache-2.0
"""The forward pass of training: log-probabilities of the response tokens, and nothing of the prompt's logits.

On request the same pass measures how much each response token attends to the prompt's text and to its images, or how
uncertain the policy was and how far from its reference.

Shapes: N sequences, P prompt length, R response length, S = P + R, L response tokens of all rows, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import ProcessorMixin

from verl.models.output_head import forward_with_head, has_plain_head
from verl.models.sequence_parallel import SequenceGroup
from verl.models.token_layout import TokenLayout
from verl.models.trainable import without_adapters
from verl.protocol import DataProto
from verl.utils.attention_metrics import KeyVocabulary, count_keys
from verl.utils.logprobs import HeadInputs, TokenStatistics, log_probs_from_logits, token_statistics
from verl.workers.actor.config import ActorConfig
from verl.workers.response_forward import ResponseForward


class PolicyForward(ResponseForward):
    """Response log-probabilities under one model, with the temperature and the support that sampling used.

    Where the model has a plain output head, its logits are never made whole: see `verl/utils/logprobs.py`.

    Args:
        model: the sharded policy or reference.
        processor: turns images to features; None for text models.
        temperature: of the rollout; logits are divided by it.
        banned_token_ids: tokens that cannot be sampled; they have probability zero here too.
        device, config, group: as in `ResponseForward`.
        is_base: runs the model without its adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin | None,
        temperature: float,
        banned_token_ids: Sequence[int],
        device: torch.device,
        config: ActorConfig,
        group: SequenceGroup | None = None,
        is_base: bool = False,
    ) -> None:
        super().__init__(model, processor, device, config, group)
        self.temperature = temperature
        self.banned_token_ids = banned_token_ids
        self.has_plain_head = has_plain_head(model)
        self.is_base = is_base

    def __call__(self, rows: DataProto) -> torch.Tensor:
        """(N, R) float32 log-probabilities of `responses`, zero outside `response_mask`; see the base class."""
        return self._log_probs(rows, self.layout(rows))

    def _log_probs(self, rows: DataProto, layout: TokenLayout) -> torch.Tensor:
        labels = layout.labels().to(self.device)

        def per_label(logits: torch.Tensor | HeadInputs) -> torch.Tensor:
            log_probs = log_probs_from_logits(logits, labels, self.temperature, self.banned_token_ids)
            return log_probs.unsqueeze(-1)  # (L, 1)

        return layout.as_stream(self._per_token(rows, layout, per_label)[:, 0])

    def statistics(self, rows: DataProto, reference: PolicyForward | None = None) -> TokenStatistics:
        """The log-probabilities, and from the same forward the entropy and the KL from `reference`.

        Args:
            rows: as for a plain call.
            reference: runs on the same rows, without gradient; None for no KL.

        Returns:
            (N, R) float32 each, zero outside `response_mask`; the entropy has no gradient.
        """
        layout = self.layout(rows)
        labels = layout.labels().to(self.device)
        ref_logits = None if reference is None else reference.logits_at_labels(rows, layout)

        def per_label(logits: torch.Tensor | HeadInputs) -> torch.Tensor:
            found = token_statistics(logits, labels, self.temperature, self.banned_token_ids, ref_logits)
            columns = [found.log_probs, found.entropy] + ([] if found.kl is None else [found.kl])
            return torch.stack(columns, dim=-1)  # (L, 2 or 3)

        streams = [layout.as_stream(values) for values in self._per_token(rows, layout, per_label).unbind(-1)]
        return TokenStatistics(streams[0], streams[1].detach(), streams[2] if len(streams) > 2 else None)

    @torch.no_grad()
    def logits_at_labels(self, rows: DataProto, layout: TokenLayout) -> torch.Tensor | HeadInputs:
        """What makes the logits (L, V) of the positions that predict `layout.labels()`, to be kept beyond the forward.

        Costs a copy of the head's weight (V, H), far less than the logits of a batch of long responses.
        """
        if not self.has_plain_head:
            with self._adapters():
                return layout.at_labels(self.model(**self.inputs(rows, layout)).logits)
        kept: list[HeadInputs] = []

        def keep(hidden_states: torch.Tensor, head: nn.Linear) -> torch.Tensor:
            bias = None if head.bias is None else head.bias.clone()
            kept.append(HeadInputs(layout.at_labels(hidden_states), head.weight.clone(), bias))
            return hidden_states

        with self._adapters():
            forward_with_head(self.model, keep, self.inputs(rows, layout))
        return kept[0]

    def _adapters(self) -> AbstractContextManager:
        """Whether they count inside."""
        return without_adapters(self.model) if self.is_base else nullcontext()

    def _per_token(
        self,
        rows: DataProto,
        layout: TokenLayout,
        compute: Callable[[torch.Tensor | HeadInputs], torch.Tensor],
    ) -> torch.Tensor:
        """(L, K) of all response tokens.

        Args:
            compute: from the logits that predict `layout.labels()`, or what makes them, to (L, K) float32.
        """
        inputs = self.inputs(rows, layout)

        def in_place_of_head(hidden_states: torch.Tensor, head: nn.Linear) -> torch.Tensor:
            return compute(HeadInputs(layout.at_labels(hidden_states), head.weight, head.bias))

        with self._adapters():
            if self.has_plain_head:
                of_labels = forward_with_head(self.model, in_place_of_head, inputs)
            else:
                of_labels = compute(layout.at_labels(self.model(**inputs).logits))
        return layout.of_all_ranks(of_labels)

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
        layout = self.layout(rows)
        full_length = rows.batch["response_mask"].shape[1]
        key_kinds = vocabulary.classify(rows.batch["input_ids"], rows.batch["attention_mask"], full_length)  # (N, S)
        with layout.record_attention(self.model, key_kinds, last_k_layers) as recorder:
            log_probs = self._log_probs(rows, layout)
        mass = nn.functional.pad(recorder.mass(), (0, 0, 0, full_length - layout.length))  # (N, R, 2)
        return log_probs, mass, count_keys(key_kinds)
