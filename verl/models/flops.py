# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a forward or training pass, computed from the model's matrices and the tokens.

Counted: multiplications with weights in decoder, vision tower and output head, and the products of attention. Not
counted: norms, activations, rope, the state updates of recurrent layers, the projector behind towers other than Qwen's
(less than a percent), and the recomputation of gradient checkpointing. So a utilisation from these counts is a model
FLOPs utilisation (MFU), not a hardware utilisation.

Shapes: images are rows of a grid (images, 3) of frames, height and width in patches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

ATTENTION_LAYERS = ("full_attention", "sliding_attention")

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIE": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H800": 989.0,
    "H800 PCIE": 756.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "A30": 165.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L20": 119.5,
    "L4": 121.0,
}
"""Dense bf16 operations per second, in 10^12, by the words of a device's name. Source: the makers' data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Peak operations per second of a device, by the name that CUDA gives; None if unknown.

    Whole words are compared, so that an H200 is not taken for an H20, nor an L40S for an L40.
    """
    words = set(re.findall(r"[A-Z0-9]+", device_name.upper()))
    known = [name for name in PEAK_TFLOPS if words.issuperset(name.split())]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


@dataclass(frozen=True)
class Work:
    """Operations of one forward pass, grouped by what the backward pass adds to them."""

    trained: float = 0.0
    """With trained weights, and in attention: the backward pass adds twice as many, for inputs and weights or keys."""
    frozen: float = 0.0
    """With frozen weights that gradients flow through: the backward pass adds as many."""
    outside: float = 0.0
    """With frozen weights before all trained ones: the backward pass adds none."""

    @property
    def forward(self) -> float:
        return self.trained + self.frozen + self.outside

    @property
    def training(self) -> float:
        """Forward and backward."""
        return 3 * self.trained + 2 * self.frozen + self.outside

    def __add__(self, other: Work) -> Work:
        return Work(self.trained + other.trained, self.frozen + other.frozen, self.outside + other.outside)

    def __mul__(self, factor: float) -> Work:
        return Work(self.trained * factor, self.frozen * factor, self.outside * factor)


class FlopCounter:
    """Counts the operations of a model's passes.

    Args:
        model: with or without adapters, sharded or not.
        tower: its vision tower; None for a text-only model.
    """

    def __init__(self, model: nn.Module, tower: nn.Module | None) -> None:
        decoder = model.get_decoder()
        self.config = decoder.config.get_text_config()
        self.per_token = _work_of(decoder, self.config)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.per_prediction = Work() if head is None else _work_of(head, self.config)
        self.attention_width = self.config.num_attention_heads * _head_dim(self.config)
        types = getattr(self.config, "layer_types", None) or ["full_attention"] * self.config.num_hidden_layers
        self.layer_types = [kind for kind in types if kind in ATTENTION_LAYERS]
        self.tower = None if tower is None else _TowerCounter(tower)

    def count(
        self,
        lengths: Sequence[int],
        predictions: int,
        media: dict[str, torch.Tensor],
        prefixes: Sequence[int] | None = None,
    ) -> Work:
        """Operations of a forward pass over pieces of `lengths` tokens and their media inputs.

        Args:
            prefixes: for each piece, the number of earlier tokens in another piece that it also attends to; None for
                whole samples.
        """
        pairs = sum(
            _causal_pairs(prefix + length, window) - _causal_pairs(prefix, window)
            for window in map(self._window, self.layer_types)
            for length, prefix in zip(lengths, prefixes or [0] * len(lengths), strict=True)
        )
        attention = Work(trained=4 * self.attention_width * pairs)
        work = self.per_token * sum(lengths) + self.per_prediction * predictions + attention
        return work if self.tower is None else work + self.tower.count(media)

    def _window(self, layer_type: str) -> int | None:
        return self.config.sliding_window if layer_type == "sliding_attention" else None


class _TowerCounter:
    """Operations of the vision tower, in which attention stays within a frame, or within a window of it."""

    def __init__(self, tower: nn.Module) -> None:
        self.config = config = tower.config
        self.trains = any(parameter.requires_grad for parameter in tower.parameters())
        merging = [name for name, _ in tower.named_modules() if "merger" in name.rpartition(".")[2]]
        self.per_patch, self.per_token = 0.0, 0.0
        for name, parameter in tower.named_parameters():
            if parameter.dim() < 2 or name.startswith("pos_embed"):
                continue
            if any(name.startswith(f"{prefix}.") for prefix in merging):
                self.per_token += 2 * parameter.numel()
            else:
                self.per_patch += 2 * parameter.numel()
        self.merged = getattr(config, "spatial_merge_size", 1)
        self.depth = getattr(config, "depth", None) or config.num_hidden_layers
        self.width = getattr(config, "embed_dim", None) or config.hidden_size
        self.full_layers = len(getattr(config, "fullatt_block_indexes", range(self.depth)))

    def count(self, media: dict[str, torch.Tensor]) -> Work:
        grids = [row for name in ("image_grid_thw", "video_grid_thw") if name in media for row in media[name].tolist()]
        if not grids and "pixel_values" in media:
            height, width = media["pixel_values"].shape[-2:]
            tiles = prod(media["pixel_values"].shape[:-3])
            patch = self.config.patch_size
            patch_height, patch_width = patch if isinstance(patch, (tuple, list)) else (patch, patch)
            grids = [[tiles, height // patch_height, width // patch_width]]
        patches = sum(prod(grid) for grid in grids)
        pairs = sum(self._pairs(grid) for grid in grids)
        operations = self.per_patch * patches + self.per_token * patches / self.merged**2 + 4 * self.width * pairs
        return Work(trained=operations) if self.trains else Work(outside=operations)

    def _pairs(self, grid: Sequence[int]) -> int:
        frames, height, width = grid
        windowed = self.depth - self.full_layers
        pairs = self.full_layers * (height * width) ** 2
        if windowed:
            side = self.config.window_size // self.config.patch_size
            pairs += windowed * _squares(height, side) * _squares(width, side)
        return frames * pairs


def _work_of(module: nn.Module, config: Any) -> Work:
    """Operations per token: two for every weight that it is multiplied with."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    work = Work()
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 or id(parameter) in embeddings:
            continue
        operations = 2.0 * parameter.numel()
        if ".experts." in name:
            operations *= _share_of_experts(config)
        work += Work(trained=operations) if parameter.requires_grad else Work(frozen=operations)
    return work


def _share_of_experts(config: Any) -> float:
    """The share of a layer's experts that a token is routed to."""
    fields = ("num_experts", "num_local_experts", "n_routed_experts")
    counts = [getattr(config, field) for field in fields if hasattr(config, field)]
    return config.num_experts_per_tok / counts[0] if counts else 1.0


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _causal_pairs(length: int, window: int | None) -> int:
    """Number of query-key pairs of one head."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def _squares(length: int, side: int) -> int:
    """Sum of the squared lengths of pieces when `length` is cut every `side`; the last piece may be shorter."""
    return length // side * side**2 + (length % side) ** 2
