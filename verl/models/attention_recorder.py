# SPDX-License-Identifier: Apache-2.0
"""Measures, while a Hugging Face model runs, how much each response token attends to text and to images.

The entries of transformers' table of attention functions are wrapped for the time of a context: each runs untouched,
then its rotated queries and keys are looked at. The model's implementation keeps its name, for other names lose the
causal mask or a vision tower's fast path without a word. No mask is read and no attention map is made.

Shapes: N samples, R response columns, S sequence length, L layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verl.models.kernels.attention_mass import BACKENDS, KeyPlan, default_backend, normalised_layer_mean

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")
"""Where torch.compile, DDP and FSDP1 keep the model they wrap."""


class AttentionMassRecorder:
    """What one forward pass showed; made by `record_attention_mass`.

    Args:
        model: a Hugging Face model.
        plan: which queries and keys to look at.
        last_k_layers: of the language model's full-attention layers; None for all.
        backend: one of `BACKENDS`; None for the default of the device.
    """

    def __init__(self, model: nn.Module, plan: KeyPlan, last_k_layers: int | None, backend: str | None) -> None:
        self._model_name = type(_unwrapped(model)).__name__
        self._implementation = _unwrapped(model).config.get_text_config()._attn_implementation
        self._plan = plan
        self._backend = backend
        self._layer_of, self.layers = _attention_layers(_unwrapped(model), last_k_layers)
        self._masses: dict[int, torch.Tensor] = {}

    def mass(self) -> torch.Tensor:
        """(N, R, 2) float32, attention of the query that predicts response token r on text keys and on vision keys.

        Per layer the mean over heads, as a share of the attention to the prompt's keys without the sink; then the
        mean over the layers. Zero where there is no response token.

        Raises:
            RuntimeError: a layer was not seen.
        """
        missing = [layer for layer in self.layers if layer not in self._masses]
        if missing:
            raise RuntimeError(
                f"{self._model_name} with attn_implementation={self._implementation!r} showed no attention of layers "
                f"{missing} (of {self.layers} to be measured): either no forward ran, or these layers do not call "
                "transformers' attention functions; set algorithm.token_weight_last_k_layers to layers that do, or "
                "worker.rollout.collect_attentions=false"
            )
        return normalised_layer_mean(torch.stack([self._masses[layer] for layer in self.layers]))

    @torch.no_grad()
    def observe(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, **options: Any) -> None:
        """Takes the masses of a layer that is wanted and not yet seen: recomputed activations come a second time."""
        layer = self._layer_of.get(id(module))
        if layer is None or layer in self._masses:
            return
        window = options.get("sliding_window")
        if window is not None and window < key.shape[2]:
            raise RuntimeError(
                f"layer {layer} of {self._model_name} (attn_implementation={self._implementation!r}) attends through "
                f"a window of {window} tokens to {key.shape[2]}: later response tokens do not see the prompt there. "
                "Give the model layers of full attention, or set worker.rollout.collect_attentions=false"
            )
        scaling = options.get("scaling")
        measure = BACKENDS[self._backend or default_backend(query.device)]
        self._masses[layer] = measure(
            query.detach(),
            key.detach(),
            self._plan,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )


@contextmanager
def record_attention_mass(
    model: nn.Module,
    key_kinds: torch.Tensor,
    response_length: int,
    last_k_layers: int | None = None,
    backend: str | None = None,
) -> Iterator[AttentionMassRecorder]:
    """Around one forward of `model` on a padded batch; afterwards the recorder's `mass()` has the result.

    The model runs as it would without: any attention implementation, padding on either side, gradient checkpointing
    and FSDP2. A second forward in the same context is not looked at.

    Args:
        model: a Hugging Face model, also sharded, compiled or with adapters.
        key_kinds: (N, S) `KeyKind` of the batch's tokens.
        response_length: R, the last columns.
        last_k_layers: measure this many of the last full-attention layers of the language model, or all if there are
            fewer; None measures all.
        backend: one of `BACKENDS`; None takes the default of the device.

    Raises:
        RuntimeError: from the forward, where a layer to be measured attends through a window.
    """
    plan = KeyPlan.from_kinds(key_kinds, response_length)
    recorder = AttentionMassRecorder(model, plan, last_k_layers, backend)
    with _tapped(recorder):
        yield recorder


@contextmanager
def record_packed_attention_mass(
    model: nn.Module,
    key_kinds: torch.Tensor,
    cumulative_lengths: torch.Tensor | Sequence[int],
    response_length: int,
    last_k_layers: int | None = None,
    backend: str | None = None,
) -> Iterator[AttentionMassRecorder]:
    """`record_attention_mass` for a forward on samples that lie end to end in one row.

    Args:
        key_kinds: (total,) `KeyKind` of the tokens.
        cumulative_lengths: (N + 1,) where each sample begins, and the total.
        response_length: R of the result; every response begins at its column 0.
    """
    plan = KeyPlan.from_packed_kinds(key_kinds, cumulative_lengths, response_length)
    recorder = AttentionMassRecorder(model, plan, last_k_layers, backend)
    with _tapped(recorder):
        yield recorder


@contextmanager
def _tapped(recorder: AttentionMassRecorder) -> Iterator[None]:
    """Wraps every entry of the table in this instance of it, and puts its own entries back."""
    own_entries = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for name in [*ALL_ATTENTION_FUNCTIONS.valid_keys(), "eager"]:
        ALL_ATTENTION_FUNCTIONS[name] = _tap(ALL_ATTENTION_FUNCTIONS.get(name), recorder)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(own_entries)


def _tap(attend: Callable[..., Any] | None, recorder: AttentionMassRecorder) -> Callable[..., Any]:
    # The parameters' names are those that models pass by keyword.
    def tapped(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = (attend or _eager_function_of(module))(module, query, key, value, attention_mask, *args, **kwargs)
        recorder.observe(module, query, key, **kwargs)
        return output

    return tapped


def _eager_function_of(module: nn.Module) -> Callable[..., Any]:
    """Eager attention has no entry in the table: each modeling file has its own function."""
    return sys.modules[type(module).forward.__module__].eager_attention_forward


def _attention_layers(model: nn.Module, last_k_layers: int | None) -> tuple[dict[int, int], list[int]]:
    """Layer number by identity of the decoder's modules that have one, and the numbers to measure.

    Vision towers lie outside the decoder, and their modules have no layer number. Hybrid models and those with sliding
    windows say in `layer_types` which layers attend to everything.
    """
    decoder = model.get_decoder()
    numbered = [part for part in decoder.modules() if isinstance(getattr(part, "layer_idx", None), int)]
    numbers = {id(part): part.layer_idx for part in numbered}
    types = getattr(decoder.config.get_text_config(), "layer_types", None)
    full = [number for number in sorted(set(numbers.values())) if types is None or types[number] == "full_attention"]
    if not full:
        raise RuntimeError(
            f"{type(model).__name__} has no layer of full attention to measure (layer_types={types}); set "
            "worker.rollout.collect_attentions=false"
        )
    chosen = full if last_k_layers is None else full[-last_k_layers:]
    return {module: number for module, number in numbers.items() if number in chosen}, chosen


def _unwrapped(model: nn.Module) -> nn.Module:
    for name in WRAPPERS:
        while isinstance(getattr(model, name, None), nn.Module):
            model = getattr(model, name)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
