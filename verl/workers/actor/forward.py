# SPDX-License-Identifier: Apache-2.0
"""What a policy says of its response tokens: log-probabilities, entropy, KL from a reference, and its attention.

Shapes: N sequences, R response length, L response tokens of all rows, K streams of the output head, H hidden size, V
vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import ProcessorMixin

from verl.models.output_head import capture_logits
from verl.models.registry import media_token_ids
from verl.models.sequence_parallel import SequenceGroup
from verl.models.token_layout import TokenLayout
from verl.models.trainable import without_adapters
from verl.protocol import DataProto
from verl.utils.attention_metrics import KeyVocabulary, count_keys
from verl.utils.logprobs import LazyLogits, token_statistics
from verl.workers.actor.config import ActorConfig
from verl.workers.response_forward import ResponseForward


@dataclass(frozen=True)
class AttentionSource:
    """Which attention is measured."""

    vocabulary: KeyVocabulary
    """Tells the prompt's text from its images."""
    last_k_layers: int | None = None
    """Measure this many of the last full-attention layers; None measures all."""


class PolicyForward(ResponseForward):
    """Streams of one policy, under the temperature and the support that sampling used.

    - `log_probs`: of the response tokens; tokens that cannot be sampled have probability zero.
    - `entropy`: of the distribution, in nats, without gradient.
    - `kl`: KL(policy || reference) over the whole vocabulary, in nats, from one further forward of the reference.
    - `attention_mass` (N, R, 2): each token's attention on the prompt's text and on its images, without gradient.
    - `attention_keys` (N, 2) int64: how many tokens each of the two has.

    Where the model has a plain output head, its logits are never made whole: see `verl/utils/logprobs.py`.

    Args:
        model: the sharded policy or reference.
        processor, device, config, group: as in `ResponseForward`.
        temperature: of the rollout; logits are divided by it.
        is_base: runs the model without its adapters.
        reference: the policy that `kl` is measured from; its model takes the same inputs. None where no KL is wanted.
        attention: which attention is measured; None where none is wanted.
    """

    head_streams = ("log_probs", "entropy", "kl")
    tap_streams = ("attention_mass", "attention_keys")

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin | None,
        device: torch.device,
        config: ActorConfig,
        group: SequenceGroup | None = None,
        temperature: float = 1.0,
        is_base: bool = False,
        reference: Self | None = None,
        attention: AttentionSource | None = None,
    ) -> None:
        super().__init__(model, processor, device, config, group)
        self.temperature = temperature
        self.banned_token_ids = media_token_ids(model.config)
        self.is_base = is_base
        self.reference = reference
        self.attention = attention

    def measure(self, rows: DataProto, wanted: Collection[str]) -> dict[str, torch.Tensor]:
        """`ResponseForward.measure` of the streams above."""
        streams = super().measure(rows, wanted)
        return streams | {name: streams[name].detach() for name in ("entropy",) if name in streams}

    def logits_at_labels(self, layout: TokenLayout, inputs: dict[str, Any]) -> LazyLogits:
        """Logits (L, V) of the positions that predict `layout.labels()`, without gradient, to be used later."""
        with self._adapters():
            return capture_logits(self.model, inputs, layout.at_labels)

    def _require_known(self, wanted: Collection[str]) -> None:
        super()._require_known(wanted)
        assert self.reference is not None or "kl" not in wanted, "there is no reference to measure kl from"
        has_tap = bool(set(self.tap_streams) & set(wanted))
        assert self.attention is not None or not has_tap, f"{wanted} need an AttentionSource"

    def _head(
        self, layout: TokenLayout, inputs: dict[str, Any], names: Sequence[str]
    ) -> Callable[[LazyLogits], torch.Tensor]:
        ref_logits = self.reference.logits_at_labels(layout, inputs) if "kl" in names else None
        return partial(self._statistics, layout, names, ref_logits)

    def _statistics(
        self, layout: TokenLayout, names: Sequence[str], ref_logits: LazyLogits | None, logits: LazyLogits
    ) -> torch.Tensor:
        labels = layout.labels().to(self.device)  # (L,)
        sampling = (self.temperature, self.banned_token_ids)
        statistics = token_statistics(logits, labels, *sampling, ref_logits, with_entropy="entropy" in names)
        columns = [getattr(statistics, name) for name in names]
        return torch.stack(columns, dim=-1) if columns else labels.new_empty(len(labels), 0)  # (L, K)

    @contextmanager
    def _tap(self, rows: DataProto, layout: TokenLayout, wanted: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
        observed: dict[str, torch.Tensor] = {}
        if not set(self.tap_streams) & set(wanted):
            yield observed
            return
        batch, source = rows.batch, self.attention
        key_kinds = source.vocabulary.classify(
            batch["input_ids"], batch["attention_mask"], batch["response_mask"].shape[1]
        )  # (N, S)
        with layout.record_attention(self.model, key_kinds, source.last_k_layers) as recorder:
            yield observed
        measured = {
            "attention_mass": layout.as_wide(recorder.mass()),  # (N, R, 2)
            "attention_keys": count_keys(key_kinds),  # (N, 2)
        }
        observed.update({name: stream for name, stream in measured.items() if name in wanted})

    def _run(
        self, head: Callable[[LazyLogits], torch.Tensor], inputs: dict[str, Any], layout: TokenLayout
    ) -> torch.Tensor:
        with self._adapters():
            return super()._run(head, inputs, layout)

    def _adapters(self) -> AbstractContextManager:
        return without_adapters(self.model) if self.is_base else nullcontext()
