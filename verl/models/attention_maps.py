# SPDX-License-Identifier: Apache-2.0
"""Attention maps of a few chosen rows: the attention on every single image token.

Shapes: T response tokens of a row, V image and video tokens of its prompt, L measured layers, G groups of heads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from verl.models.kernels.attention_map import attention_map
from verl.models.kernels.attention_mass import KeyPlan
from verl.models.sequence_parallel import SequenceGroup


@dataclass(frozen=True)
class MapRequest:
    """Which rows get attention maps, and in what detail."""

    rows: Collection[int]
    """Row numbers in the measured batch."""
    head_groups: int | None = None
    """G: splits each layer's heads into this many groups of neighbours; None for the mean over all heads."""
    keeps_layers: bool = False
    """Whether each layer and group keeps its own map, which takes L x G times the memory of one."""


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one row's response tokens, as shares of their attention to the prompt without its first token.

    All are float32 NumPy arrays, which can be sent between processes.
    """

    layers: tuple[int, ...]
    """The measured layers, ascending."""
    vision: np.ndarray
    """(T, V), mean over heads, then over the layers. Its sum over V is the token's vision mass of `attention_mass`."""
    layer_masses: np.ndarray
    """(L, T, 2), each layer's share on text and on images."""
    group_masses: np.ndarray | None = None
    """(L, G, T, 2), the same for groups of heads, as shares of each group's attention to the prompt."""
    group_vision: np.ndarray | None = None
    """(L, G, T, V), the map of each layer and group; G is 1 without groups."""


class AttentionMaps:
    """Collects the requested maps layer by layer while a model runs.

    Args:
        plan: gives the queries and keys of the rows.
        request: the maps to collect.
        layers: the layers to measure.
        group: the ranks that share the attention heads, with the same request; None if this rank has all heads.

    Raises:
        ValueError: `request` asks for groups of heads while ranks share the heads.
    """

    def __init__(
        self, plan: KeyPlan, request: MapRequest, layers: Collection[int], group: SequenceGroup | None
    ) -> None:
        if group is not None and request.head_groups is not None:
            raise ValueError(
                f"head_groups={request.head_groups}: groups of heads are not told apart where {group.size} ranks "
                "share them; set worker.actor.ulysses_size=1, or leave head_groups out"
            )
        self._plan = plan
        self._request = request
        self._samples = [sample for sample in plan.samples if sample.row in request.rows]
        self._layers = sorted(layers)
        self._group = group
        self._sums: dict[int, torch.Tensor] = {}  # by row
        self._masses: dict[tuple[int, int], torch.Tensor] = {}  # by layer and row
        self._group_shares: dict[tuple[int, int], torch.Tensor] = {}

    def observe(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Adds a layer's maps. If ranks share the heads, this is a collective for each row of the request.

        Raises:
            ValueError: the groups of the request do not divide the layer's heads.
        """
        head_groups = self._request.head_groups or 1
        if query.shape[1] % head_groups:
            raise ValueError(f"head_groups={head_groups} does not divide the {query.shape[1]} heads of layer {layer}")
        for sample in self._samples:
            group_attention = attention_map(query, key, self._plan, sample, scaling, softcap, sinks, head_groups)
            if self._group is not None:
                group_attention = self._group.mean(group_attention)
            shares = _normalised(group_attention.mean(dim=0))  # (T, V + 1)
            self._sums[sample.row] = self._sums.get(sample.row, 0.0) + shares[:, :-1].double()
            self._masses[layer, sample.row] = _masses(shares).cpu()
            if self._request.head_groups is not None or self._request.keeps_layers:
                group_shares = _normalised(group_attention)  # (G, T, V + 1)
                kept = group_shares if self._request.keeps_layers else _masses(group_shares)
                self._group_shares[layer, sample.row] = kept.cpu()

    def by_row(self, response_mask: torch.Tensor) -> dict[int, AttentionMap]:
        """The maps by row number. A row without a response or without a prompt has none.

        Args:
            response_mask: (N, R) bool; the response tokens that get a map.
        """
        columns = self._plan.to(torch.device("cpu")).result_columns
        maps = {}
        for sample in self._samples:
            row, is_response = sample.row, response_mask[sample.row].cpu()[columns[sample.queries]]
            masses = torch.stack([self._masses[layer, row] for layer in self._layers])  # (L, T, 2)
            group_masses = group_vision = None
            if self._group_shares:
                kept = torch.stack([self._group_shares[layer, row] for layer in self._layers])[:, :, is_response]
                group_masses = _masses(kept).numpy() if self._request.keeps_layers else kept.numpy()
                group_vision = kept[..., :-1].numpy() if self._request.keeps_layers else None
            vision = (self._sums[row].cpu()[is_response] / len(self._layers)).float()
            maps[row] = AttentionMap(
                tuple(self._layers), vision.numpy(), masses[:, is_response].numpy(), group_masses, group_vision
            )
        return maps


def _normalised(attention: torch.Tensor) -> torch.Tensor:
    """(..., V + 1) shares of the attention to the prompt, which is the last entry of the input (..., V + 2)."""
    prompt = attention[..., -1:]
    return torch.where(prompt == 0, 0.0, attention[..., :-1] / prompt)


def _masses(shares: torch.Tensor) -> torch.Tensor:
    """(..., 2) attention on text and on images, from (..., V + 1) with the text last."""
    return torch.stack([shares[..., -1], shares[..., :-1].sum(dim=-1)], dim=-1)
