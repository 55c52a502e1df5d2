# SPDX-License-Identifier: Apache-2.0
"""A policy's streams for response tokens: log-probabilities, entropy, KL, attention, similarity to images.

Shapes: N sequences, R response length, S = prompt length + R, L response tokens of all rows, K streams of the output
head, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from verl.data.features import Featurizer
from verl.data.image_noise import ImageNoise
from verl.models.attention_maps import MapRequest
from verl.models.hidden_states import observe_hidden_states
from verl.models.output_head import capture_logits
from verl.models.registry import media_token_ids
from verl.models.sequence_parallel import SequenceGroup
from verl.models.token_layout import TokenLayout
from verl.protocol import DataProto
from verl.trainer.config import LayerChoice
from verl.utils.attention_metrics import KeyKind, KeyVocabulary, count_keys
from verl.utils.device_copies import to_device
from verl.utils.logprobs import LazyLogits, token_statistics
from verl.workers.actor.config import ActorConfig
from verl.workers.response_forward import Column, ResponseForward


@dataclass(frozen=True)
class PolicyHead:
    """The replacement of a policy's output head: takes the logits, returns the streams (L, K)."""

    names: Sequence[str]
    """Names of the K streams."""
    labels: torch.Tensor
    """(L,) the response tokens."""
    temperature: float
    """Logits are divided by it."""
    banned_token_ids: Sequence[int]
    """Tokens that cannot be sampled."""
    reference: LazyLogits | None
    """The reference's logits, for `kl`."""
    degraded: LazyLogits | None
    """The policy's logits with degraded images, for `image_kl`."""
    has_media: torch.Tensor | None
    """(L,) bool, whether the token's row has images or videos, for `image_kl`."""

    def __call__(self, logits: LazyLogits) -> torch.Tensor:
        """(L, K), a column for each name."""
        if not self.names:
            return self.labels.new_empty(len(self.labels), 0)
        compare = partial(token_statistics, logits, self.labels, self.temperature, self.banned_token_ids)
        statistics = compare(self.reference, with_entropy="entropy" in self.names)
        columns = {"log_probs": statistics.log_probs, "entropy": statistics.entropy, "kl": statistics.kl}
        if self.degraded is not None:
            columns["image_kl"] = torch.where(self.has_media, compare(self.degraded, with_entropy=False).kl, 0)
        return torch.stack([columns[name] for name in self.names], dim=-1)


@dataclass(frozen=True)
class SignalSettings:
    """Settings for the streams of token signals."""

    vocabulary: KeyVocabulary
    """Token ids that distinguish the prompt's text from its images."""
    layers: LayerChoice = "all"
    """The full-attention layers that attention is taken from."""
    noise: ImageNoise = ImageNoise("patches", 0.5)
    """How images are degraded for `image_kl`."""
    head_groups: int | None = None
    """Number of head groups with separate `attention_maps`; None for the mean over all heads."""


MAPPED_ROWS = "is_mapped"
"""Stream (N,) bool: the rows that get `attention_maps`."""


class PolicyForward(ResponseForward):
    """Streams of one policy, with the temperature and the excluded tokens of sampling.

    - `log_probs`: log-probabilities of the response tokens; tokens that cannot be sampled have probability zero.
    - `entropy`: entropy of the distribution, in nats, without gradient.
    - `kl`: KL(policy || reference) over the whole vocabulary, in nats, from one further forward of the reference.
    - `image_kl`: KL(policy || policy with degraded images) over the whole vocabulary, in nats, from one further
      forward; exactly 0 for rows without images and videos. Only for passes without gradient.
    - `attention_mass` (N, R, 2): each token's attention on the prompt's text and on its images, without gradient.
    - `attention_keys` (N, 2) int64: the numbers of text tokens and of image tokens.
    - `attention_maps` (N,) objects: an `AttentionMap` for each row with a response that `is_mapped` selects, None for
      other rows. The other streams do not change, bit for bit.
    - `hidden_cosine`: cosine of the last hidden state that predicts the token and the mean last hidden state of the
      prompt's image tokens, without gradient; NaN on the response tokens of rows without images and videos.

    With a plain output head, the logits are never stored as a whole: see `verl/utils/logprobs.py`.

    Args:
        model: the policy or reference, sharded or whole.
        featurizer, device, config, group, is_base: as in `ResponseForward`.
        temperature: the rollout's temperature; logits are divided by it.
        reference: the reference for `kl`; its model takes the same inputs. None if `kl` is not needed.
        signals: settings of the last five streams; None if they are not needed.
    """

    head_streams = ("log_probs", "entropy", "kl", "image_kl")
    constant_streams = ("entropy",)
    tap_streams = ("attention_mass", "attention_keys", "attention_maps", "hidden_cosine")

    def __init__(
        self,
        model: nn.Module,
        featurizer: Featurizer | None,
        device: torch.device,
        config: ActorConfig,
        group: SequenceGroup | None = None,
        temperature: float = 1.0,
        is_base: bool = False,
        reference: Self | None = None,
        signals: SignalSettings | None = None,
    ) -> None:
        super().__init__(model, featurizer, device, config, group, is_base)
        self.temperature = temperature
        self.banned_token_ids = media_token_ids(model.config)
        self.reference = reference
        self.signals = signals

    def logits_at_labels(self, layout: TokenLayout, inputs: dict[str, Any]) -> LazyLogits:
        """Logits (L, V) that predict `layout.labels()`, without gradient, for later use."""
        with self._adapters():
            return capture_logits(self.model, inputs, layout.label_outputs)

    def _head(
        self, rows: DataProto, layout: TokenLayout, inputs: dict[str, Any], names: Sequence[str]
    ) -> Callable[[LazyLogits], torch.Tensor]:
        labels = to_device(layout.labels(), self.device)  # (L,)
        reference = degraded = has_media = None
        if "kl" in names:
            assert self.reference is not None, "there is no reference to measure kl from"
            reference = self.reference.logits_at_labels(layout, inputs)
        if "image_kl" in names:
            assert self.signals is not None, "image_kl needs SignalSettings"
            media = self._on_device(self._media(rows, layout, self.signals.noise))
            degraded = self.logits_at_labels(layout, inputs | media)
            has_media = to_device(self._rows_with_media(rows)[layout.label_rows()], self.device)  # (L,)
        return PolicyHead(names, labels, self.temperature, self.banned_token_ids, reference, degraded, has_media)

    def _rows_with_media(self, rows: DataProto) -> torch.Tensor:
        """(N,) bool."""
        if self.featurizer is None:
            return torch.zeros(len(rows), dtype=torch.bool)
        return torch.tensor([bool(handles) for handles in rows.non_tensor_batch["multi_modal_data"]])

    @contextmanager
    def _tap(self, rows: DataProto, layout: TokenLayout, wanted: Collection[str]) -> Iterator[dict[str, Column]]:
        observed: dict[str, Column] = {}
        if not set(self.tap_streams) & set(wanted):
            yield observed
            return
        assert self.signals is not None, f"{', '.join(self.tap_streams)} need SignalSettings"
        batch = rows.batch
        key_kinds = self.signals.vocabulary.classify(
            batch["input_ids"], batch["attention_mask"], batch["response_mask"].shape[1]
        )  # (N, S)
        maps = None
        if "attention_maps" in wanted:
            maps = MapRequest(batch[MAPPED_ROWS].nonzero()[:, 0].tolist(), self.signals.head_groups)
        with ExitStack() as taps:
            if maps is not None or "attention_mass" in wanted:
                attention = layout.record_attention(self.model, key_kinds, self.signals.layers, maps)
                recorder = taps.enter_context(attention)
            if "hidden_cosine" in wanted:
                seen_states = taps.enter_context(observe_hidden_states(self.model))
            yield observed
        if "attention_mass" in wanted:
            observed["attention_mass"] = layout.pad_masses(recorder.mass())  # (N, R, 2)
        if maps is not None:
            observed["attention_maps"] = np.full(len(rows), None, dtype=object)  # (N,)
            for row, row_map in recorder.maps(layout.response_mask).items():
                observed["attention_maps"][row] = row_map
        if "attention_keys" in wanted:
            observed["attention_keys"] = count_keys(key_kinds)  # (N, 2)
        if "hidden_cosine" in wanted:
            (states,) = seen_states
            image_means = layout.row_means(states, key_kinds == KeyKind.VISION)  # (N, H)
            label_states = layout.label_states(states).float()  # (L, H)
            label_rows = to_device(layout.label_rows(), self.device)  # (L,)
            cosine = nn.functional.cosine_similarity(label_states, image_means[label_rows], dim=-1)
            observed |= layout.as_streams(["hidden_cosine"], cosine[:, None])
