# SPDX-License-Identifier: Apache-2.0
"""What a policy says of its response tokens: log-probabilities, entropy, KL, attention, similarity to images.

Shapes: N sequences, R response length, S = prompt length + R, L response tokens of all rows, K streams of the output
head, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from verl.data.features import Featurizer
from verl.data.image_noise import ImageNoise
from verl.models.hidden_states import observe_hidden_states
from verl.models.output_head import capture_logits
from verl.models.registry import media_token_ids
from verl.models.sequence_parallel import SequenceGroup
from verl.models.token_layout import TokenLayout
from verl.models.trainable import without_adapters
from verl.protocol import DataProto
from verl.trainer.config import LayerChoice
from verl.utils.attention_metrics import KeyKind, KeyVocabulary, count_keys
from verl.utils.logprobs import LazyLogits, token_statistics
from verl.workers.actor.config import ActorConfig
from verl.workers.response_forward import ResponseForward


@dataclass(frozen=True)
class SignalSettings:
    """What the streams that token signals ask for are measured with."""

    vocabulary: KeyVocabulary
    """Tells the prompt's text from its images."""
    layers: LayerChoice = "all"
    """The full-attention layers that attention is taken from."""
    noise: ImageNoise = ImageNoise("patches", 0.5)
    """What spoils images for `image_kl`."""


class PolicyForward(ResponseForward):
    """Streams of one policy, under the temperature and the support that sampling used.

    - `log_probs`: of the response tokens; tokens that cannot be sampled have probability zero.
    - `entropy`: of the distribution, in nats, without gradient.
    - `kl`: KL(policy || reference) over the whole vocabulary, in nats, from one further forward of the reference.
    - `image_kl`: KL(policy || policy with spoilt images) over the whole vocabulary, in nats, from one further forward;
      exactly 0 for rows without images and videos. It is meant for passes without gradient.
    - `attention_mass` (N, R, 2): each token's attention on the prompt's text and on its images, without gradient.
    - `attention_keys` (N, 2) int64: how many tokens each of the two has.
    - `hidden_cosine`: cosine of the last hidden state that predicts the token and the mean last hidden state of the
      prompt's image tokens, without gradient; NaN on the response tokens of rows without images and videos.

    Where the model has a plain output head, its logits are never made whole: see `verl/utils/logprobs.py`.

    Args:
        model: the policy or reference, sharded or whole.
        featurizer, device, config, group: as in `ResponseForward`.
        temperature: of the rollout; logits are divided by it.
        is_base: runs the model without its adapters.
        reference: the policy that `kl` is measured from; its model takes the same inputs. None where no KL is wanted.
        signals: how the last four streams are measured; None where they are not wanted.
    """

    head_streams = ("log_probs", "entropy", "kl", "image_kl")
    tap_streams = ("attention_mass", "attention_keys", "hidden_cosine")

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
        super().__init__(model, featurizer, device, config, group)
        self.temperature = temperature
        self.banned_token_ids = media_token_ids(model.config)
        self.is_base = is_base
        self.reference = reference
        self.signals = signals

    def measure(self, rows: DataProto, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """`ResponseForward.measure` of the streams above."""
        streams = super().measure(rows, wanted)
        if "entropy" in streams:
            streams["entropy"] = streams["entropy"].detach()
        if "image_kl" in streams:
            media = rows.non_tensor_batch.get("multi_modal_data", [None] * len(rows))
            has_media = torch.tensor([bool(handles) for handles in media], device=self.device)
            streams["image_kl"] = torch.where(has_media[:, None], streams["image_kl"], 0)
        return streams

    def logits_at_labels(self, layout: TokenLayout, inputs: dict[str, Any]) -> LazyLogits:
        """Logits (L, V) of the positions that predict `layout.labels()`, without gradient, to be used later."""
        with self._adapters():
            return capture_logits(self.model, inputs, layout.at_labels)

    def _require_known(self, wanted: Collection[str]) -> None:
        super()._require_known(wanted)
        assert self.reference is not None or "kl" not in wanted, "there is no reference to measure kl from"
        of_signals = {"image_kl", *self.tap_streams} & set(wanted)
        assert self.signals is not None or not of_signals, f"{sorted(of_signals)} need SignalSettings"

    def _head(
        self, rows: DataProto, layout: TokenLayout, inputs: dict[str, Any], names: Sequence[str]
    ) -> Callable[[LazyLogits], torch.Tensor]:
        others: dict[str, LazyLogits] = {}
        if "kl" in names:
            others["kl"] = self.reference.logits_at_labels(layout, inputs)
        if "image_kl" in names:
            spoilt = self._on_device(self._media(rows, layout, self.signals.noise))
            others["image_kl"] = self.logits_at_labels(layout, inputs | spoilt)
        return partial(self._statistics, layout, names, others)

    def _statistics(
        self, layout: TokenLayout, names: Sequence[str], others: dict[str, LazyLogits], logits: LazyLogits
    ) -> torch.Tensor:
        """(L, K); `others` are what the policy is compared with, by the name of the KL."""
        labels = layout.labels().to(self.device)  # (L,)
        compare = partial(token_statistics, logits, labels, self.temperature, self.banned_token_ids)
        statistics = compare(others.get("kl"), with_entropy="entropy" in names)
        columns = {"log_probs": statistics.log_probs, "entropy": statistics.entropy, "kl": statistics.kl}
        if "image_kl" in names:
            columns["image_kl"] = compare(others["image_kl"], with_entropy=False).kl
        return torch.stack([columns[name] for name in names], dim=-1) if names else labels.new_empty(len(labels), 0)

    @contextmanager
    def _tap(self, rows: DataProto, layout: TokenLayout, wanted: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
        observed: dict[str, torch.Tensor] = {}
        if not set(self.tap_streams) & set(wanted):
            yield observed
            return
        batch = rows.batch
        key_kinds = self.signals.vocabulary.classify(
            batch["input_ids"], batch["attention_mask"], batch["response_mask"].shape[1]
        )  # (N, S)
        with ExitStack() as taps:
            if "attention_mass" in wanted:
                attention = layout.record_attention(self.model, key_kinds, self.signals.layers)
                recorder = taps.enter_context(attention)
            if "hidden_cosine" in wanted:
                seen_states = taps.enter_context(observe_hidden_states(self.model))
            yield observed
        if "attention_mass" in wanted:
            observed["attention_mass"] = layout.as_wide(recorder.mass())  # (N, R, 2)
        if "attention_keys" in wanted:
            observed["attention_keys"] = count_keys(key_kinds)  # (N, 2)
        if "hidden_cosine" in wanted:
            (states,) = seen_states
            image_means = layout.row_means(states, key_kinds == KeyKind.VISION)  # (N, H)
            of_labels = layout.label_states(states).float()  # (L, H)
            cosine = nn.functional.cosine_similarity(
                of_labels, image_means[layout.label_rows().to(self.device)], dim=-1
            )
            observed |= layout.as_streams(["hidden_cosine"], cosine[:, None])

    def _run(
        self, head: Callable[[LazyLogits], torch.Tensor], inputs: dict[str, Any], layout: TokenLayout
    ) -> torch.Tensor:
        with self._adapters():
            return super()._run(head, inputs, layout)

    def _adapters(self) -> AbstractContextManager:
        return without_adapters(self.model) if self.is_base else nullcontext()
