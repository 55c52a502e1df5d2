# SPDX-License-Identifier: Apache-2.0
"""Lays out the rows of a micro-batch for the model: padded, packed end to end, or packed with shared prompts.

All layouts hold the same tokens. They return results for the same L response tokens, row after row.

Shapes: N sequences, R response length, S = prompt length + R, T tokens of a packed row, W ranks that share it, L
response tokens of all rows, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from verl.models.attention_maps import MapRequest
from verl.models.attention_recorder import AttentionMassRecorder, record_attention_mass, record_mass_at
from verl.models.attention_table import NOT_A_MASK, PACKING_IMPLEMENTATIONS, SAMPLES, PackedSamples
from verl.models.position_ids import swap_rope_rows
from verl.models.registry import packs
from verl.models.sequence_parallel import SequenceGroup
from verl.protocol import DataProto
from verl.trainer.config import LayerChoice
from verl.utils.device_copies import to_device
from verl.utils.response_span import response_columns, response_ends, response_tokens

KEEPS_SAMPLES_APART = {"full_attention", "sliding_attention"}
"""The kinds of layers (names of transformers' `layer_types`) that work on packed rows, given the samples' borders."""


class TokenLayout(ABC):
    """The rows of a micro-batch as model inputs.

    Args:
        rows: `input_ids`, `attention_mask` (N, S), `position_ids` (N, S) or (N, 4, S), `response_mask` (N, R).
    """

    def __init__(self, rows: DataProto) -> None:
        self.response_mask = rows.batch["response_mask"].bool()  # (N, R)
        self.length = int(response_ends(self.response_mask).max())
        """Response columns up to the end of the longest response."""
        attention_mask = rows.batch["attention_mask"]
        behind_prompt = response_columns(attention_mask.shape[1], self.response_mask.shape[1])
        self.own_columns = [is_token.nonzero()[:, 0] for is_token in attention_mask[:, behind_prompt]]
        """For each row, the response columns with a token, of the response or between its turns."""

    @abstractmethod
    def pieces(self) -> list[tuple[int, int]]:
        """For each piece, its number of tokens, and the number of prefix tokens that it also attends to."""

    def prompt_rows(self) -> Sequence[int]:
        """The rows whose prompts and media are in the layout, in its order."""
        return range(len(self.response_mask))

    @abstractmethod
    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward without media; tensors on the CPU."""

    @abstractmethod
    def labels(self) -> torch.Tensor:
        """(L,) the response tokens; if ranks share the row, only the tokens that this rank's positions predict."""

    @abstractmethod
    def label_outputs(self, kept: torch.Tensor) -> torch.Tensor:
        """(L, H), the model's output at the position that predicts each of `labels`.

        Args:
            kept: the outputs at the positions of `logits_to_keep`.
        """

    def gather_ranks(self, label_values: torch.Tensor) -> torch.Tensor:
        """(L, K) for all response tokens, from the (L, K) of this rank's labels."""
        return label_values

    def as_streams(
        self, names: Sequence[str], label_values: torch.Tensor, constant: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Streams (N, R) by name, zero outside `response_mask`, from the columns of (L, K) of this rank's `labels`.

        Args:
            constant: the names whose streams carry no gradient.
        """
        mask = to_device(self.response_mask, label_values.device)
        zeros = label_values.new_zeros(mask.shape)  # (N, R)
        columns = dict(zip(names, self.gather_ranks(label_values).unbind(-1), strict=True))
        return {
            name: zeros.masked_scatter(mask, column.detach() if name in constant else column)
            for name, column in columns.items()
        }

    def label_states(self, states: torch.Tensor) -> torch.Tensor:
        """(L, H), the hidden state that predicts each of this rank's `labels`.

        Args:
            states: the decoder's output at all of this rank's positions.
        """
        keep = self.model_inputs()["logits_to_keep"]
        kept = slice(-keep, None) if isinstance(keep, int) else to_device(keep, states.device)
        return self.label_outputs(states[:, kept])

    @abstractmethod
    def label_rows(self) -> torch.Tensor:
        """(L,) row numbers of this rank's `labels`."""

    @abstractmethod
    def row_means(self, states: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
        """(N, H) float32, the mean hidden state of each row's chosen tokens; NaN for a row without any.

        Args:
            states: the decoder's output at all of this rank's positions.
            is_chosen: (N, S) bool.
        """

    def pad_masses(self, masses: torch.Tensor) -> torch.Tensor:
        """Pads the recorder's (N, columns, 2) to (N, R, 2), with zeros outside `response_mask`."""
        mask = to_device(self.response_mask, masses.device)
        wide = nn.functional.pad(masses, (0, 0, 0, mask.shape[1] - masses.shape[1]))
        return torch.where(mask[:, :, None], wide, 0)

    @abstractmethod
    def record_attention(
        self,
        model: nn.Module,
        key_kinds: torch.Tensor,
        layers: LayerChoice | int | None,
        maps: MapRequest | None = None,
    ) -> Iterator[AttentionMassRecorder]:
        """A context around the model's forward; its recorder's mass (N, columns, 2) is for `pad_masses`.

        Args:
            key_kinds: (N, S) `KeyKind` of the rows' tokens.
            layers, maps: as in `record_attention_mass`.
        """

    def _record_in_one_row(
        self,
        model: nn.Module,
        kinds: torch.Tensor,
        places: Sequence[torch.Tensor],
        layers: LayerChoice | int | None,
        maps: MapRequest | None,
        group: SequenceGroup | None = None,
    ) -> Iterator[AttentionMassRecorder]:
        """`record_attention` for packed rows: `kinds` (T,), and for each row the positions of its tokens."""
        num_columns = max((int(columns[-1]) + 1 for columns in self.own_columns if len(columns) > 0), default=0)
        return record_mass_at(model, kinds, places, self.own_columns, num_columns, layers, group=group, maps=maps)


class PaddedLayout(TokenLayout):
    """Rows with left-padded prompts and right-padded responses; columns with padding in every row are cut."""

    def __init__(self, rows: DataProto) -> None:
        super().__init__(rows)
        batch = rows.batch
        first = int(batch["attention_mask"].argmax(dim=1).min())
        responses = response_columns(batch["input_ids"].shape[1], self.response_mask.shape[1])
        self.columns = slice(first, responses.start + self.length)
        self.is_label = self.response_mask[:, : self.length]  # (N, length)
        self.input_ids = batch["input_ids"][:, self.columns]  # (N, s)
        self.attention_mask = batch["attention_mask"][:, self.columns]  # (N, s)
        self.position_ids = swap_rope_rows(batch["position_ids"][..., self.columns])  # (N, s) or (4, N, s)

    def pieces(self) -> list[tuple[int, int]]:
        return [(length, 0) for length in self.attention_mask.sum(dim=1).tolist()]

    def model_inputs(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "logits_to_keep": self.length + 1,
        }

    def labels(self) -> torch.Tensor:
        return self.input_ids[:, response_columns(self.input_ids.shape[1], self.length)][self.is_label]

    def label_outputs(self, kept: torch.Tensor) -> torch.Tensor:
        # An output predicts the next token, so `kept` begins one position before the responses. The indices come from
        # a mask on the CPU: indexing by a mask on the device would make the host wait.
        rows, columns = (to_device(places, kept.device) for places in self.is_label.nonzero(as_tuple=True))
        return kept[rows, columns]

    def label_rows(self) -> torch.Tensor:
        return self.response_mask.nonzero()[:, 0]

    def row_means(self, states: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
        chosen = to_device(is_chosen[:, self.columns].float(), states.device)  # (N, s)
        return torch.einsum("ns,nsh->nh", chosen, states.float()) / chosen.sum(dim=1, keepdim=True)

    def record_attention(
        self,
        model: nn.Module,
        key_kinds: torch.Tensor,
        layers: LayerChoice | int | None,
        maps: MapRequest | None = None,
    ) -> Iterator[AttentionMassRecorder]:
        return record_attention_mass(model, key_kinds[:, self.columns], self.length, layers, maps=maps)


class PackedLayout(TokenLayout):
    """All rows end to end in one, without padding. `why_not_packed` must return None for the model.

    Args:
        rows: as in the base class.
        group: the ranks that share the row; all have the same rows. None for a single rank.
    """

    def __init__(self, rows: DataProto, group: SequenceGroup | None = None) -> None:
        super().__init__(rows)
        batch = rows.batch
        self._is_real = batch["attention_mask"].bool()  # (N, S)
        self.borders = tuple(accumulate(self._is_real.sum(dim=1).tolist(), initial=0))
        self.group = group
        self.input_ids = self._packed(batch["input_ids"])  # (T,)
        self.position_ids = self._packed(swap_rope_rows(batch["position_ids"]))  # (T,) or (4, T)
        is_response = response_tokens(batch["attention_mask"], self.response_mask)  # (N, S)
        self.predictors = self._packed(is_response).nonzero()[:, 0] - 1  # (L,)
        if group is not None:
            self._pad_to_multiple(group.size)
            own = group.local_slice(len(self.input_ids))
            self.is_local = (self.predictors >= own.start) & (self.predictors < own.stop)  # (L,)
            self.local_predictors = self.predictors[self.is_local]
            self.first = own.start

    def _packed(self, values: torch.Tensor) -> torch.Tensor:
        """(..., T) from (..., N, S)."""
        return values[..., self._is_real]

    def _pad_to_multiple(self, size: int) -> None:
        """Appends a filler sample without labels, so that every rank gets the same number of tokens."""
        missing = -len(self.input_ids) % size
        self.input_ids = torch.cat([self.input_ids, self.input_ids[-1:].expand(missing)])
        more_positions = torch.arange(missing).expand(*self.position_ids.shape[:-1], missing)
        self.position_ids = torch.cat([self.position_ids, more_positions], dim=-1)

    def pieces(self) -> list[tuple[int, int]]:
        return [(end - start, 0) for start, end in pairwise(self.borders)]

    def model_inputs(self) -> dict[str, Any]:
        num_tokens = len(self.input_ids)
        with_filler = self.borders if self.borders[-1] == num_tokens else (*self.borders, num_tokens)
        keep = self.predictors if self.group is None else self.local_predictors - self.first
        return {
            "input_ids": self.input_ids[None],
            "attention_mask": torch.empty(NOT_A_MASK),
            "position_ids": self.position_ids.unsqueeze(-2),  # (1, T) or (4, 1, T)
            "logits_to_keep": keep,
            SAMPLES: PackedSamples(with_filler, self.group),
        }

    def labels(self) -> torch.Tensor:
        return self.input_ids[(self.predictors if self.group is None else self.local_predictors) + 1]

    def label_outputs(self, kept: torch.Tensor) -> torch.Tensor:
        return kept[0]

    def label_rows(self) -> torch.Tensor:
        rows = self.response_mask.nonzero()[:, 0]
        return rows if self.group is None else rows[self.is_local]

    def row_means(self, states: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
        num_rows = len(is_chosen)
        rows = torch.where(is_chosen, torch.arange(num_rows)[:, None], num_rows)  # tokens not chosen: an extra row
        row_indices = nn.functional.pad(
            self._packed(rows), (0, len(self.input_ids) - self.borders[-1]), value=num_rows
        )
        if self.group is not None:
            row_indices = row_indices[self.group.local_slice(len(self.input_ids))]
        row_indices = to_device(row_indices, states.device)  # (T,) or (T / W,)
        sums = states.new_zeros(num_rows + 1, states.shape[-1], dtype=torch.float32)
        sums.index_add_(0, row_indices, states[0].float())
        if self.group is not None:
            sums = self.group.mean(sums) * self.group.size
        return sums[:-1] / to_device(is_chosen.sum(dim=1, keepdim=True), states.device)

    def gather_ranks(self, label_values: torch.Tensor) -> torch.Tensor:
        if self.group is None:
            return label_values
        # Ranks have the same number of positions, but different numbers of labels.
        share = len(self.input_ids) // self.group.size
        at_positions = label_values.new_zeros(share, *label_values.shape[1:])
        local_places = to_device(self.local_predictors - self.first, label_values.device)
        at_positions = at_positions.index_put((local_places,), label_values)
        return self.group.gather(at_positions)[to_device(self.predictors, label_values.device)]

    def record_attention(
        self,
        model: nn.Module,
        key_kinds: torch.Tensor,
        layers: LayerChoice | int | None,
        maps: MapRequest | None = None,
    ) -> Iterator[AttentionMassRecorder]:
        packed = self._packed(key_kinds)
        packed = nn.functional.pad(packed, (0, len(self.input_ids) - len(packed)))
        places = [torch.arange(start, end) for start, end in pairwise(self.borders)]
        return self._record_in_one_row(model, packed, places, layers, maps, self.group)


class SharedPromptLayout(TokenLayout):
    """Packed, with each prompt once: a group's prompt, then its responses end to end, then the next group.

    A response attends to its prompt and to itself and keeps the position ids of its row, so all results equal the
    results of packed rows. The gradient of a prompt's tokens is the sum over its responses.

    Args:
        rows: as in the base class, with non-tensor `uid`. Rows with the same uid are a group and have the same prompt.
    """

    def __init__(self, rows: DataProto) -> None:
        super().__init__(rows)
        batch = rows.batch
        is_real = batch["attention_mask"].bool()  # (N, S)
        first_column = response_columns(is_real.shape[1], self.response_mask.shape[1]).start
        is_label = response_tokens(batch["attention_mask"], self.response_mask)  # (N, S)
        self.groups = _rows_by(rows.non_tensor_batch["uid"])
        self._places: list[torch.Tensor] = [torch.empty(0)] * len(is_real)
        predictors: list[torch.Tensor] = [torch.empty(0)] * len(is_real)
        token_rows, token_columns, borders, continued = [], [], [0], []
        for members in self.groups:
            prompt = is_real[members[0], :first_column].nonzero()[:, 0]
            start, number = borders[-1], len(continued)
            token_rows.append(torch.full_like(prompt, members[0]))
            token_columns.append(prompt)
            continued.append(None)
            places_of_prompt = torch.arange(start, start + len(prompt))
            if len(members) > 1:  # a single row is one piece, with its prompt
                borders.append(start + len(prompt))
            for row in members:
                columns = first_column + self.own_columns[row]
                token_rows.append(torch.full_like(columns, row))
                token_columns.append(columns)
                first = borders[-1] if len(members) > 1 else start + len(prompt)
                own = torch.arange(first, first + len(columns))
                borders.append(first + len(columns))
                if len(members) > 1:
                    continued.append(number)
                self._places[row] = torch.cat([places_of_prompt, own])
                before = self._places[row][len(prompt) - 1 : -1]  # the position before each of the row's response part
                predictors[row] = before[is_label[row, columns]]
        self.token_rows, self.token_columns = torch.cat(token_rows), torch.cat(token_columns)  # (T,)
        self.predictors = torch.cat(predictors)  # (L,), row after row
        self.samples = PackedSamples(tuple(borders), None, tuple(continued))
        self.input_ids = batch["input_ids"][self.token_rows, self.token_columns]  # (T,)
        self.position_ids = batch["position_ids"][self.token_rows, ..., self.token_columns]  # (T,) or (T, 4)
        self._labels = batch["input_ids"][is_label]  # (L,)

    def pieces(self) -> list[tuple[int, int]]:
        return [(piece.length, piece.prefix_length) for piece in self.samples.pieces]

    def prompt_rows(self) -> Sequence[int]:
        return [members[0] for members in self.groups]

    def model_inputs(self) -> dict[str, Any]:
        positions = self.position_ids.mT if self.position_ids.dim() == 2 else self.position_ids
        return {
            "input_ids": self.input_ids[None],
            "attention_mask": torch.empty(NOT_A_MASK),
            "position_ids": positions.unsqueeze(-2),  # (1, T) or (4, 1, T)
            "logits_to_keep": self.predictors,
            SAMPLES: self.samples,
        }

    def labels(self) -> torch.Tensor:
        return self._labels

    def label_outputs(self, kept: torch.Tensor) -> torch.Tensor:
        return kept[0]

    def label_rows(self) -> torch.Tensor:
        return self.response_mask.nonzero()[:, 0]

    def row_means(self, states: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
        # Prompts of a group are equal, in the same columns.
        chosen = [places[is_chosen[row, self.token_columns[places]]] for row, places in enumerate(self._places)]
        means = [states[0, to_device(own, states.device)].float().mean(dim=0) for own in chosen]
        return torch.stack(means)

    def record_attention(
        self,
        model: nn.Module,
        key_kinds: torch.Tensor,
        layers: LayerChoice | int | None,
        maps: MapRequest | None = None,
    ) -> Iterator[AttentionMassRecorder]:
        kinds = key_kinds[self.token_rows, self.token_columns]
        return self._record_in_one_row(model, kinds, self._places, layers, maps)


def _rows_by(uids: Sequence[Any]) -> list[list[int]]:
    """Groups of rows with the same uid, in the order of their first rows."""
    groups: dict[Any, list[int]] = {}
    for row, uid in enumerate(uids):
        groups.setdefault(uid, []).append(row)
    return list(groups.values())


def why_not_packed(model: nn.Module) -> str | None:
    """Why rows of `model` cannot be packed; None if they can.

    Only attention keeps packed samples apart, so no other layer may mix tokens along the row.
    """
    decoder = model.get_decoder()
    config = decoder.config.get_text_config()
    if config._attn_implementation not in PACKING_IMPLEMENTATIONS:
        return f"attn_implementation={config._attn_implementation} does not keep samples apart"
    others = set(getattr(config, "layer_types", None) or ()) - KEEPS_SAMPLES_APART
    others |= {"convolution" for part in decoder.modules() if isinstance(part, nn.Conv1d)}
    if others:
        return f"it has layers of {', '.join(sorted(others))}, which mix tokens along the row"
    return None if packs(model.config) else "its attention depends on more than the order of the tokens"
