# SPDX-License-Identifier: Apache-2.0
"""Saves and restores one rank's part of a model: three files a rank, in EasyR1's layout and names.

`model_*` holds the state dict under Hugging Face names: DTensor shards, or plain tensors at world size 1. `optim_*`
holds the optimizer's state dict by parameter name, `extra_state_*` the schedule and the random number states. The
folder `huggingface/` beside them holds what says which model this is, so that a merger needs nothing else.

Of a model with low-rank adapters the files hold what trains, the adapters: the weights under them are those of
`model_path`. The folder `lora_adapter/` holds the adapters once more, whole and in peft's own format.

Files are written in the layout of the ranks that save. They load on any number of ranks (`saved_ranks.py`).
"""

import logging
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.functional import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

from verl.config import cut
from verl.models.saved_files import add_legacy_rope, apply_umask
from verl.models.trainable import ADAPTER, adapter_config
from verl.utils.checkpoint import damaged_checkpoint, extra_state_file, model_file, optim_file
from verl.utils.checkpoint_folder import FileRecord, read_manifest, record_files
from verl.utils.shards import cut_like, sharding_group_size
from verl.utils.writing import naming_write_errors
from verl.workers.adamw_bf16 import settle_compensation
from verl.workers.saved_ranks import SavedRanks

ADAPTER_FOLDER = "lora_adapter"

logger = logging.getLogger(__name__)


class SavesPretrained(Protocol):
    """A configuration, tokenizer or processor of transformers."""

    def save_pretrained(self, folder: Path) -> Any: ...


class FSDPCheckpoint:
    """One rank's view of `<checkpoint>/actor/` or `<checkpoint>/critic/`.

    Args:
        model: sharded with FSDP2, or whole on a single worker.
        optimizer, scheduler: restored with the model, unless the checkpoint has the model only.
        described_by: written to `huggingface/` by rank 0.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        described_by: Sequence[SavesPretrained],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.described_by = described_by
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.adapters = adapter_config(model)
        self.options = StateDictOptions(
            # It is what a single rank holds anyway: its files are then plain tensors, as EasyR1's are.
            full_state_dict=self.world_size == 1,
            cpu_offload=True,
            ignore_frozen_params=self.adapters is not None,
            strict=self.adapters is None,
        )

    def save(self, folder: str, model_only: bool) -> dict[str, FileRecord]:
        """Writes this rank's files and flushes them.

        Args:
            folder: on storage that all nodes see.
            model_only: leaves optimizer and extra state out.

        Returns:
            The files that this rank wrote, by their paths below the checkpoint's folder, the parent of `folder`.

        Raises:
            ValueError: a weight is not finite.
            RuntimeError: a file could not be written.
        """
        root = self._start_folder(folder)
        return self._write(root, self._contents(model_only))

    def copy(self, folder: str, model_only: bool) -> Callable[[], dict[str, FileRecord]]:
        """Copies what `save` would write to host memory; the function that is returned writes it, in any thread."""
        root = self._start_folder(folder)
        contents = [(name, _copied(content)) for name, content in self._contents(model_only)]
        return lambda: self._write(root, contents)

    def num_bytes(self, model_only: bool) -> int:
        """About what this rank's files will hold."""
        parameters = [
            parameter for parameter in self.model.parameters() if self.adapters is None or parameter.requires_grad
        ]
        states = [] if model_only else [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = (_local(value) for value in (*parameters, *states) if isinstance(value, torch.Tensor))
        return sum(tensor.nbytes for tensor in tensors)

    def _start_folder(self, folder: str) -> Path:
        root = Path(folder)
        if self.rank == 0:
            # What an earlier run left there would be taken for this one's.
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
        dist.barrier()
        return root

    def _contents(self, model_only: bool) -> Iterator[tuple[str, Any]]:
        """What this rank's files hold, by name, one at a time; a collective."""
        model_state = self._model_state(self.options)
        _require_finite(model_state, "the model")
        yield self._name(model_file), model_state
        if not model_only:
            yield self._name(optim_file), self._optimizer_state()
            yield self._name(extra_state_file), {"lr_scheduler": self.scheduler.state_dict(), "rng": _random_states()}
        if self.adapters is not None:
            whole = self._model_state(replace(self.options, full_state_dict=True))
            if self.rank == 0:
                yield ADAPTER_FOLDER, whole

    def _write(self, root: Path, contents: Iterable[tuple[str, Any]]) -> dict[str, FileRecord]:
        written = []
        for name, content in contents:
            written.append(root / name)
            with naming_write_errors(root / name):
                if name == ADAPTER_FOLDER:
                    self._save_adapters(root / name, content)
                else:
                    torch.save(content, root / name)
        if self.rank == 0:
            written.append(root / "huggingface")
            with naming_write_errors(root / "huggingface"):
                for description in self.described_by:
                    description.save_pretrained(root / "huggingface")
                add_legacy_rope(root / "huggingface")
        return record_files(root.parent, *written)

    def load(self, folder: str, model_only: bool) -> None:
        """Restores this rank's part, also of a checkpoint that another number of ranks saved.

        The random number generators go on where they were only on as many ranks as saved; nothing in training draws
        from them.

        Args:
            model_only: the checkpoint was saved without optimizer; optimizer and schedule keep their fresh state.

        Raises:
            ValueError: there is no such folder, a file is missing or damaged or holds numbers that are not finite, or
                it is of another model or of other adapters than this run's.
        """
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(
                f"{root} does not exist: the run that saved this checkpoint trained no {root.name}; resume with its "
                "algorithm.adv_estimator, or start a run of its own with another trainer.save_checkpoint_path"
            )
        patterns = self.model.state_dict()
        saved = SavedRanks(root, self.rank, self.world_size, sharding_group_size(list(patterns.values())))
        self._require_same_model(saved.model_path, saved.shapes)
        model_state = saved.model(patterns)
        with _refused_in(root):
            _require_finite(model_state, str(saved.model_path))
        set_model_state_dict(self.model, model_state, options=self.options)
        if model_only:
            return
        extra_state, optimizer_state = saved.extra_state(), saved.optimizer(patterns)
        with _refused_in(root):
            self._require_fitting_states(
                optimizer_state, extra_state, is_proven=read_manifest(root.parent) is not None
            )
            self._restore_optimizer(optimizer_state, extra_state["lr_scheduler"])
            if "rng" in extra_state:
                _restore_random_states(extra_state["rng"])

    def _model_state(self, options: StateDictOptions) -> dict[str, torch.Tensor]:
        state = get_model_state_dict(self.model, options=options)
        if self.adapters is None:
            return state
        # torch leaves frozen weights out under one of their names, and a tied one has two.
        trained = self._trained()
        return {name: value for name, value in state.items() if name in trained}

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _save_adapters(self, folder: Path, whole: dict[str, torch.Tensor]) -> None:
        """For `PeftModel.from_pretrained` and all that reads its format."""
        replace(self.adapters, inference_mode=True).save_pretrained(str(folder))
        # The embeddings never change, and finding that out peft would ask the hub.
        weights = get_peft_model_state_dict(self.model, whole, ADAPTER, save_embedding_layers=False)
        prefixed = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
        save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        apply_umask(folder)

    def _require_same_model(self, path: Path, saved: dict[str, torch.Size]) -> None:
        """Where weights are left out, as under adapters, nothing else would tell a file that does not fit."""
        state = self.model.state_dict() if self.adapters is None else self._trained()
        own = {name: value.shape for name, value in state.items()}
        differing = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        if differing:
            raise ValueError(
                f"{path} does not fit this run's model: {len(differing)} weights are missing, unknown or of another "
                f"shape, such as {differing[0]}; resume with the model_path, lora and freeze_vision_tower of then"
            )
        if self.adapters is not None:
            trained = LoraConfig.from_pretrained(str(path.parent / "lora_adapter"))
            if trained.lora_alpha != self.adapters.lora_alpha:
                raise ValueError(
                    f"worker.actor.model.lora.alpha={self.adapters.lora_alpha} would change the policy: the adapters "
                    f"of {path.parent} were trained with {trained.lora_alpha}; resume with that"
                )
            ours, theirs = self.adapters.base_model_name_or_path, trained.base_model_name_or_path
            if ours != theirs:
                logger.warning("the adapters of %s were trained on %s and go on on %s", path.parent, theirs, ours)

    def _optimizer_state(self) -> dict[str, Any]:
        """Empty before the first step: reading the state would make one up, with a step that never was."""
        if not self.optimizer.state:
            return {}
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.options)

    def _require_fitting_states(
        self, optimizer_state: dict[str, Any], extra_state: dict[str, Any], is_proven: bool
    ) -> None:
        """What torch would take without a word, or fail on in the first step.

        Args:
            is_proven: whether a manifest has shown that the files are the ones that were saved.

        Raises:
            ValueError: naming the parameter and what of its state does not fit.
        """
        steps = extra_state["lr_scheduler"]["last_epoch"]
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"the schedule stands at step {steps!r}")
        if not optimizer_state:
            # A run whose every step was skipped saves none.
            if steps > 0 and not is_proven:
                raise ValueError(f"the optimizer state is empty, though the schedule stands at step {steps}")
            return
        for name, parameter in self._trained().items():
            state = optimizer_state["state"].get(name)
            if state is None:
                continue  # no gradient ever reached it, or it was frozen
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if key not in state:
                    raise ValueError(f"the optimizer state of {name} has no {key}")
                if key != "step" and state[key].shape != parameter.shape:
                    raise ValueError(
                        f"{key} in the optimizer state of {name} has the shape {tuple(state[key].shape)}, and the "
                        f"parameter {tuple(parameter.shape)}"
                    )
            tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            _require_finite(tensors, f"the optimizer state of {name}")

    def _restore_optimizer(self, optimizer_state: dict[str, Any], scheduler_state: dict[str, Any]) -> None:
        """Takes moments and the place in the schedule from the checkpoint, the optimizer and its rates from this run.

        Parameters missing from the saved state start fresh: no gradient ever reached them, as in a layer of a vision
        tower that the model leaves out, or they were frozen.
        """
        base_rates = self.scheduler.base_lrs
        if optimizer_state:
            self._take_states(optimizer_state["state"])
            settle_compensation(self.optimizer)
        self.scheduler.load_state_dict({**scheduler_state, "base_lrs": base_rates})
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        for group, rate, factor in zip(self.optimizer.param_groups, base_rates, factors, strict=True):
            group["lr"] = rate * factor
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _take_states(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Gives the optimizer these states, by the names of parameters, sharded as those are or whole.

        torch's `set_optimizer_state_dict` would first make gradients and states of zeros for all parameters.
        """
        names = self.model.named_parameters(remove_duplicate=False)
        saved = {parameter: states[name] for name, parameter in names if name in states}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        by_number = {
            number: {key: _cut_like(value, parameter) for key, value in saved[parameter].items()}
            for number, parameter in enumerate(parameters)
            if parameter in saved
        }
        groups = self.optimizer.state_dict()["param_groups"]  # parameters by number, the settings of this run
        self.optimizer.load_state_dict({"state": by_number, "param_groups": groups})
        for state in self.optimizer.state.values():
            for key, value in state.items():
                # What did not change place or precision is still the file's own memory.
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    state[key] = value.clone()

    def _name(self, file_name: Callable[[int, int], str]) -> str:
        return file_name(self.world_size, self.rank)


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _cut_like(value: Any, parameter: torch.Tensor) -> Any:
    """A state sharded as its parameter; a lone rank's files hold whole ones, also where FSDP shards over it alone."""
    is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    return cut_like(value, parameter) if is_whole else value


def _require_finite(tensors: Mapping[str, torch.Tensor], owner: str) -> None:
    for name, value in tensors.items():
        local = _local(value)
        if local.is_floating_point() and not local.isfinite().all():
            number = (~local.isfinite()).sum().item()
            raise ValueError(f"{owner} has numbers that are not finite: {number} of {local.numel()} in {name}")


def _copied(content: Any) -> Any:
    """With tensors of its own, in host memory."""
    if isinstance(content, torch.Tensor):
        return content.detach().clone()
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_copied(value) for value in content)
    return content


@contextmanager
def _refused_in(root: Path) -> Iterator[None]:
    """Says which checkpoint has what is refused inside, also where its parts are not what they should be."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise damaged_checkpoint(root.parent, f"in {root}, {cut(problem, 300)}") from error


def _random_states() -> dict[str, Any]:
    states = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    np.random.set_state(states["numpy"])
    random.setstate(states["random"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
