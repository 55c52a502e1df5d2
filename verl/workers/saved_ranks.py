# SPDX-License-Identifier: Apache-2.0
"""Reads one model's files of a checkpoint: a rank's own files, or its part of all files if the ranks differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from verl.utils.checkpoint import damaged_checkpoint, extra_state_file, model_file, optim_file
from verl.utils.safe_load import load_tensors
from verl.utils.shards import assemble, cut_like, sharding_group_size

CONTENTS: dict[Callable[[int, int], str], tuple[str, Callable[[dict[str, Any]], bool]]] = {
    model_file: ("weights", lambda state: all(isinstance(value, torch.Tensor) for value in state.values())),
    optim_file: ("optimizer state", lambda state: not state or {"state", "param_groups"} <= state.keys()),
    extra_state_file: ("schedule", lambda state: isinstance(state.get("lr_scheduler"), dict)),
}
"""For each kind of file, its content in words, and a check of the loaded dictionary."""


class SavedRanks:
    """The files in `<checkpoint>/actor/` or `<checkpoint>/critic/`, read by one rank of a run.

    If the number of ranks and the size of sharding groups are the same as when saving, a rank takes its own files.
    Otherwise it takes its part of all ranks' files, one tensor at a time. Files are memory-mapped: copy the tensors,
    and do not change the files before.

    Args:
        root: the folder.
        rank, world_size: of this run.
        group_size: number of ranks that share one copy of the model in this run.

    Raises:
        ValueError: a file is missing, damaged or of another kind.
    """

    def __init__(self, root: Path, rank: int, world_size: int, group_size: int) -> None:
        self.root = root
        self.rank = rank
        self.world_size = self._saved_world_size(world_size)
        own = rank if self.world_size == world_size else 0
        self.model_path = root / model_file(self.world_size, own)
        self._own = own
        self._model = self._load(model_file, own)
        self.has_same_layout = (
            self.world_size == world_size and sharding_group_size(list(self._model.values())) == group_size
        )

    def _saved_world_size(self, world_size: int) -> int:
        matches = [re.fullmatch(r"model_world_size_(\d+)_rank_\d+\.pt", path.name) for path in self.root.iterdir()]
        sizes = {int(match[1]) for match in matches if match is not None}
        if world_size in sizes:
            return world_size
        if len(sizes) != 1:
            content = f"files of runs with {sorted(sizes)} workers" if sizes else "no file of a model's weights"
            raise damaged_checkpoint(self.root.parent, f"{self.root} has {content}")
        return sizes.pop()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the model's whole tensors, by name."""
        return {name: value.shape for name, value in self._model.items()}

    def model(self, patterns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights, sharded as in this run.

        Args:
            patterns: this run's weights by name.
        """
        if self.has_same_layout:
            return self._model
        ranks = self._load_all(model_file)
        return {name: self._part(name, [state[name] for state in ranks], patterns[name]) for name in ranks[0]}

    def optimizer(self, patterns: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The optimizer's state by parameter name, sharded as in this run; empty before the first step."""
        if self.has_same_layout:
            return self._load(optim_file, self._own)
        ranks = self._load_all(optim_file)
        if not ranks[0]:
            return {}
        states = {
            name: {
                key: self._part(f"{key} of {name}", [state["state"][name][key] for state in ranks], patterns.get(name))
                for key in entries
            }
            for name, entries in ranks[0]["state"].items()
        }
        return {**ranks[0], "state": states}

    def extra_state(self) -> dict[str, Any]:
        """The schedule, and with the same number of ranks also the states of this rank's random number generators."""
        state = self._load(extra_state_file, self._own)
        if not self.has_same_layout:
            state.pop("rng", None)
        return state

    def _part(self, name: str, shards: list[Any], pattern: torch.Tensor | None) -> Any:
        if not isinstance(shards[0], torch.Tensor):
            return shards[0]
        try:
            whole = assemble(shards)
        except ValueError as error:
            raise damaged_checkpoint(self.root.parent, f"{name} in {self.root}: {error}") from error
        return whole if pattern is None else cut_like(whole, pattern)

    def _load(self, file_name: Callable[[int, int], str], rank: int) -> dict[str, Any]:
        path = self.root / file_name(self.world_size, rank)
        if not path.exists():
            raise damaged_checkpoint(self.root.parent, f"{path} does not exist")
        try:
            state = load_tensors(path, mmap=True)
        except ValueError as error:
            raise damaged_checkpoint(self.root.parent, str(error)) from error
        content, is_content = CONTENTS[file_name]
        if not isinstance(state, dict) or not is_content(state):
            raise damaged_checkpoint(self.root.parent, f"{path} holds no {content}, but something else")
        return state

    def _load_all(self, file_name: Callable[[int, int], str]) -> list[dict[str, Any]]:
        return [self._load(file_name, rank) for rank in range(self.world_size)]
