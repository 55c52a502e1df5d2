# SPDX-License-Identifier: Apache-2.0
"""Measures, while a Hugging Face model runs, how much each response token attends to text and to images.

Inside a context, a tap is added to the attention functions of transformers: the function runs unchanged, then the tap
reads its rotated queries and keys. No attention mask is read and no attention map is stored.

Shapes: N samples, R response columns, S sequence length, L layers, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.module_tracker import ModuleTracker
from transformers import PretrainedConfig

from verl.models.attention_maps import AttentionMap, AttentionMaps, MapRequest
from verl.models.attention_table import tapped_attention, window_of_layer
from verl.models.kernels.attention_mass import BACKENDS, KeyPlan, default_backend, normalised_layer_mean
from verl.models.sequence_parallel import SequenceGroup
from verl.trainer.config import LayerChoice

WRAPPERS = ("_orig_mod", "module")
"""Attributes in which torch.compile, and DDP and FSDP1, keep the wrapped model."""

CHANGES_OF_SCORES = ("position_bias", "indices", "block_indices")
"""Attention arguments of some models that change the plain softmax of scaled products over all earlier tokens."""

REMEDY = "set worker.rollout.collect_attentions=false"


class AttentionMassRecorder:
    """The attention masses of one forward pass. `record_attention_mass` creates it.

    Args:
        model: a Hugging Face model.
        plan: the queries and keys to measure.
        shape: rows and columns of the token batch that `plan` describes.
        layers: a choice of the language model's full-attention layers; see `choose_layers`.
        backend: one of `BACKENDS`; None for the default of the device.
        group: the ranks that share the attention heads; None if this rank has all heads.
        maps: the rows to make attention maps of; None for no row.

    Raises:
        ValueError: `layers` is no valid choice, or `AttentionMaps` refuses `maps`.
        RuntimeError: no layer has full attention.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: KeyPlan,
        shape: tuple[int, int],
        layers: LayerChoice | int | None,
        backend: str | None,
        group: SequenceGroup | None = None,
        maps: MapRequest | None = None,
    ) -> None:
        inner = _unwrapped(model)
        implementation = inner.config.get_text_config()._attn_implementation
        self._model_name = f"{type(inner).__name__} with attn_implementation={implementation!r}"
        self._layer_of, self.layers = _layers_to_measure(inner, layers)
        self._plan = plan
        self._shape = shape
        self._reach = plan.longest_reach
        self._backend = backend
        self._group = group
        self._masses: dict[int, torch.Tensor] = {}
        self._maps = None if maps is None else AttentionMaps(plan, maps, self.layers, group)

    def mass(self) -> torch.Tensor:
        """(N, R, 2) float32, attention on text keys and on vision keys, by the query that predicts response token r.

        Per layer the mean over heads, as a share of the attention to the prompt's keys without the sink; then the
        mean over the layers. Zero where there is no response token. If ranks share the heads, this is one collective
        for all layers.

        Raises:
            RuntimeError: a layer was not seen.
        """
        self._require_all_layers()
        masses = torch.stack([self._masses[layer] for layer in self.layers])  # (L, N, R, 3)
        return normalised_layer_mean(masses if self._group is None else self._group.mean(masses))

    def maps(self, response_mask: torch.Tensor) -> dict[int, AttentionMap]:
        """The attention maps of the requested rows, by row number; a row without a response has none.

        Args:
            response_mask: (N, at least R) bool, the response tokens that get a map.

        Raises:
            RuntimeError: a layer was not seen.
        """
        self._require_all_layers()
        return {} if self._maps is None else self._maps.by_row(response_mask)

    def _require_all_layers(self) -> None:
        missing = [layer for layer in self.layers if layer not in self._masses]
        if missing:
            raise RuntimeError(
                f"{self._model_name} showed no attention of layers {missing}, of {self.layers} to be measured: either "
                "no forward ran, or these layers do not take their attention function from transformers' common "
                f"table; set algorithm.token_weight_layers to layers that do, or {REMEDY}"
            )

    # Traced, a back end's loops over samples would be unrolled, and compiled anew for every batch.
    @torch.compiler.disable
    def observe(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, **options: Any) -> None:
        """Computes and stores the mass of a layer, if the layer is to be measured.

        Args:
            query: (B, H, S, D). key: (B, Hkv, S, D).
            options: the other keyword arguments of the attention function.

        Raises:
            RuntimeError: the layer's kind of attention cannot be measured, or the layer was measured already.
        """
        layer = self._layer_of.get(id(module))
        if layer is None:
            return
        if layer in self._masses:
            if _in_backward():  # gradient checkpointing recomputes the layer
                return
            raise RuntimeError(
                f"layer {layer} of {self._model_name} ran twice while its attention was measured; one context of "
                "record_attention_mass is for one forward"
            )
        self._check(layer, module, query, key, options)
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        measure = BACKENDS[self._backend or default_backend(query.device)]
        self._masses[layer] = measure(query, key, self._plan, scaling, softcap=softcap, sinks=sinks)
        if self._maps is not None:
            self._maps.observe(layer, query, key, scaling, softcap, sinks)

    def _check(
        self, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]
    ) -> None:
        name = f"layer {layer} of {self._model_name}"
        shapes = [(tensor.shape[0], tensor.shape[2]) for tensor in (query, key)]
        if shapes != [self._shape, self._shape]:
            raise RuntimeError(
                f"{name} has queries and keys of {shapes[0]} and {shapes[1]} rows and tokens, but key_kinds has "
                f"{self._shape}; give the forward whole sequences, all at once and without a cache of earlier ones"
            )
        window = window_of_layer(module, options)
        if window is not None and window < self._reach:
            raise RuntimeError(
                f"{name} attends through a window of {window} tokens, and a response ends {self._reach} tokens after "
                f"its prompt began: its last tokens do not see the whole prompt; keep prompt and response together "
                f"within the window, or {REMEDY}"
            )
        for option in CHANGES_OF_SCORES:
            if options.get(option) is not None:
                raise RuntimeError(
                    f"{name} gives its attention {option}, which changes who attends to whom in a way that cannot be "
                    f"measured; {REMEDY}"
                )


@contextmanager
def record_attention_mass(
    model: nn.Module,
    key_kinds: torch.Tensor,
    response_length: int,
    layers: LayerChoice | int | None = None,
    backend: str | None = None,
    maps: MapRequest | None = None,
) -> Iterator[AttentionMassRecorder]:
    """A context around one forward of `model` on a padded batch; afterwards the recorder's `mass()` has the result.

    The model's outputs do not change. Works with any attention implementation, padding at any place, gradient
    checkpointing and FSDP2. The backward pass may run inside the context or after it.

    Args:
        model: a Hugging Face model; it may be sharded, compiled or have adapters.
        key_kinds: (N, S) `KeyKind` of the batch's tokens.
        response_length: R, the last columns.
        layers: which of the language model's full-attention layers to measure; see `choose_layers`.
        backend: one of `BACKENDS`; None takes the default of the device.
        maps: the rows to make attention maps of, for the recorder's `maps()`; None for no row.

    Raises:
        ValueError: `layers` is no valid choice, or `maps` has groups that do not divide the heads.
        RuntimeError: the model has no full-attention layer. During the forward: a measured layer has a sliding window
            shorter than a sample, or another kind of attention that does not cover all earlier tokens; the forward's
            shape differs from the shape of `key_kinds`; or it is the second forward inside the context.
    """
    plan = KeyPlan.from_kinds(key_kinds, response_length)
    recorder = AttentionMassRecorder(model, plan, tuple(key_kinds.shape), layers, backend, maps=maps)
    with tapped_attention(recorder.observe):
        yield recorder


@contextmanager
def record_mass_at(
    model: nn.Module,
    key_kinds: torch.Tensor,
    places: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
    response_length: int,
    layers: LayerChoice | int | None = None,
    backend: str | None = None,
    group: SequenceGroup | None = None,
    maps: MapRequest | None = None,
) -> Iterator[AttentionMassRecorder]:
    """`record_attention_mass` for samples that are packed into one row, end to end or with shared prompts.

    Args:
        key_kinds: (total,) `KeyKind` of the tokens.
        places: for each sample, the positions of its tokens in the row, ascending.
        columns: for each sample, the columns of the result for its response tokens, ascending.
        response_length: R of the result.
        group: the ranks that share the row with this one; all get the same result.
    """
    plan = KeyPlan.from_places(key_kinds, places, columns, response_length)
    recorder = AttentionMassRecorder(model, plan, (1, len(key_kinds)), layers, backend, group, maps)
    with tapped_attention(recorder.observe):
        yield recorder


def require_layers(model_config: PretrainedConfig, choice: LayerChoice) -> None:
    """Raise unless a model with this config has the layers that `choice` names.

    Raises:
        ValueError: as `choose_layers`.
    """
    config = model_config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    choose_layers([number for number, kind in enumerate(types) if kind == "full_attention"], choice)


def choose_layers(full: Sequence[int], choice: LayerChoice | int | None) -> list[int]:
    """Select full-attention layers by a choice such as `last:8`.

    Args:
        full: the numbers of the model's full-attention layers, ascending.
        choice: `all` or None; `middle`, the middle third, at least one; `last:K` or the number K, the last K, or all
            if there are fewer; or layer numbers.

    Raises:
        ValueError: `choice` is none of these, or names a layer that is not in `full`.
    """
    if choice is None or choice == "all":
        return list(full)
    if choice == "middle":
        third = len(full) // 3
        return list(full[third : len(full) - third])
    if isinstance(choice, tuple):
        others = sorted(set(choice) - set(full))
        if others:
            raise ValueError(
                f"algorithm.token_weight_layers={list(choice)}: {others} are no full-attention layers of this model, "
                f"which has {list(full)}"
            )
        return sorted(choice)
    count = int(choice.removeprefix("last:")) if isinstance(choice, str) else choice
    if count < 1:
        raise ValueError(f"layers={choice} is no number of layers; give 1 or more, or None for all")
    return list(full[-count:])


def _layers_to_measure(model: nn.Module, layers: LayerChoice | int | None) -> tuple[dict[int, int], list[int]]:
    """Layer numbers by `id` of the decoder's modules that have one, and the layer numbers to measure.

    Vision towers lie outside the decoder, and their modules have no layer number. Hybrid models and models with
    sliding windows list in `layer_types` which layers have full attention.
    """
    decoder = model.get_decoder()
    numbers = {
        id(part): part.layer_idx for part in decoder.modules() if isinstance(getattr(part, "layer_idx", None), int)
    }
    types = getattr(decoder.config.get_text_config(), "layer_types", None)
    last = max(numbers.values(), default=-1)
    if types is not None and last >= len(types):
        raise RuntimeError(
            f"{type(model).__name__} has a layer {last}, but its layer_types have only {len(types)} entries; give its "
            f"config one entry for each layer, or {REMEDY}"
        )
    full = [number for number in sorted(set(numbers.values())) if types is None or types[number] == "full_attention"]
    if not full:
        raise RuntimeError(
            f"{type(model).__name__} has no layer of full attention to measure (layer_types={types}); {REMEDY}"
        )
    chosen = choose_layers(full, layers)
    return {module: number for module, number in numbers.items() if number in chosen}, chosen


def _in_backward() -> bool:
    return ModuleTracker().is_bw  # it asks the autograd engine and needs no earlier tracking


def _unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside any wrappers."""
    for name in WRAPPERS:
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
