# SPDX-License-Identifier: Apache-2.0
"""Saves and restores one rank's part of a model: three files per rank, in EasyR1's layout and names.

`model_*` holds the state dict under Hugging Face names: DTensor shards, or plain tensors at world size 1. `optim_*`
holds the optimizer's state dict by parameter name, `extra_state_*` the schedule and the random number states. The
folder `huggingface/` beside them holds config, tokenizer and processor, so that a merger needs nothing else.

For a model with low-rank adapters the files hold only the adapters; the frozen weights are in `model_path`. The folder
`lora_adapter/` has a second copy of the adapters, whole and in peft's format.

Each rank writes its shards. The files load on any number of ranks (`saved_ranks.py`).
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
        optimizer, scheduler: restored with the model, unless the checkpoint has only the model.
        pretrained_parts: config, tokenizer and so on, which rank 0 writes to `huggingface/`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        pretrained_parts: Sequence[SavesPretrained],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.pretrained_parts = pretrained_parts
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.adapters = adapter_config(model)
        self.options = StateDictOptions(
            # A single rank has the whole tensors anyway; its files then hold plain tensors, as in EasyR1.
            full_state_dict=self.world_size == 1,
            cpu_offload=True,
            ignore_frozen_params=self.adapters is not None,
            strict=self.adapters is None,
        )

    def save(self, folder: str, model_only: bool) -> dict[str, FileRecord]:
        """Writes this rank's files and flushes them.

        Args:
            folder: a folder on storage that all nodes share.
            model_only: leaves out optimizer and extra state.

        Returns:
            The files that this rank wrote, by their paths below the checkpoint's folder, the parent of `folder`.

        Raises:
            ValueError: a weight is not finite.
            RuntimeError: a file could not be written.
        """
        root = self._start_folder(folder)
        return self._write(root, self._contents(model_only))

    def copy(self, folder: str, model_only: bool) -> Callable[[], dict[str, FileRecord]]:
        """Copies the content of `save` to host memory; returns a function that writes it, in any thread."""
        root = self._start_folder(folder)
        contents = [(name, _copied(content)) for name, content in self._contents(model_only)]
        return lambda: self._write(root, contents)

    def num_bytes(self, model_only: bool) -> int:
        """Approximate size of this rank's files in bytes."""
        parameters = [
            parameter for parameter in self.model.parameters() if self.adapters is None or parameter.requires_grad
        ]
        states = [] if model_only else [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = (_local(value) for value in (*parameters, *states) if isinstance(value, torch.Tensor))
        return sum(tensor.nbytes for tensor in tensors)

    def _start_folder(self, folder: str) -> Path:
        root = Path(folder)
        if self.rank == 0:
            # Files of an earlier run would be mistaken for files of this one.
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
        dist.barrier()
        return root

    def _contents(self, model_only: bool) -> Iterator[tuple[str, Any]]:
        """Yields (name, content) of this rank's files, one at a time; a collective."""
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
                for description in self.pretrained_parts:
                    description.save_pretrained(root / "huggingface")
                add_legacy_rope(root / "huggingface")
        return record_files(root.parent, *written)

    def load(self, folder: str, model_only: bool) -> None:
        """Restores this rank's part, also from a checkpoint of another number of ranks.

        The states of random number generators are restored only with the same number of ranks; training does not use
        these generators.

        Args:
            model_only: the checkpoint was saved without optimizer; optimizer and schedule keep their fresh state.

        Raises:
            ValueError: the folder does not exist, a file is missing or damaged or has numbers that are not finite, or
                the model or the adapters differ from this run's.
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
        # torch omits a frozen weight under only one of its names, and a tied weight has two.
        trained = self._trained()
        return {name: value for name, value in state.items() if name in trained}

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _save_adapters(self, folder: Path, whole: dict[str, torch.Tensor]) -> None:
        """Writes the adapters for `PeftModel.from_pretrained` and other readers of its format."""
        replace(self.adapters, inference_mode=True).save_pretrained(str(folder))
        # The embeddings never change; peft would ask the hub to find that out.
        weights = get_peft_model_state_dict(self.model, whole, ADAPTER, save_embedding_layers=False)
        prefixed = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
        save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        apply_umask(folder)

    def _require_same_model(self, path: Path, saved: dict[str, torch.Size]) -> None:
        """Raise if the saved names or shapes differ; for partial files, as with adapters, torch would not notice."""
        state = self.model.state_dict() if self.adapters is None else self._trained()
        own = {name: value.shape for name, value in state.items()}
        differing = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        if differing:
            raise ValueError(
                f"{path} does not fit this run's model: {len(differing)} weights are missing, unknown or of another "
                f"shape, such as {differing[0]}; resume with the original model_path, lora and freeze_vision_tower"
            )
        if self.adapters is not None:
            trained = LoraConfig.from_pretrained(str(path.parent / "lora_adapter"))
            if trained.lora_alpha != self.adapters.lora_alpha:
                raise ValueError(
                    f"worker.actor.model.lora.alpha={self.adapters.lora_alpha} would change the policy: the adapters "
                    f"of {path.parent} were trained with {trained.lora_alpha}; resume with this value"
                )
            ours, theirs = self.adapters.base_model_name_or_path, trained.base_model_name_or_path
            if ours != theirs:
                logger.warning("the adapters of %s were trained on %s and go on on %s", path.parent, theirs, ours)

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state; empty before the first step, since torch would otherwise invent a state of step 1."""
        if not self.optimizer.state:
            return {}
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.options)

    def _require_fitting_states(
        self, optimizer_state: dict[str, Any], extra_state: dict[str, Any], is_proven: bool
    ) -> None:
        """Check for errors that torch would accept silently, or only notice in the first step.

        Args:
            is_proven: whether the files were verified with a manifest.

        Raises:
            ValueError: a state does not fit; the message names the parameter.
        """
        steps = extra_state["lr_scheduler"]["last_epoch"]
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"the schedule stands at step {steps!r}")
        if not optimizer_state:
            # A run in which every optimizer step was skipped has no states.
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
        """Takes the moments and the schedule's position from the checkpoint, and all settings from this run.

        Parameters without a saved state start fresh: they were frozen, or never had a gradient, such as an unused
        layer of a vision tower.
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
        """Loads states by parameter name into the optimizer; they may be sharded like the parameters or whole.

        torch's `set_optimizer_state_dict` would first allocate gradients and states of zeros for all parameters.
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
                # Tensors that kept device and precision still use the mapped file's memory.
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    state[key] = value.clone()

    def _name(self, file_name: Callable[[int, int], str]) -> str:
        return file_name(self.world_size, self.rank)


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _cut_like(value: Any, parameter: torch.Tensor) -> Any:
    """A state sharded like its parameter; files of a single rank hold whole states, even under FSDP."""
    is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    return cut_like(value, parameter) if is_whole else value


def _require_finite(tensors: Mapping[str, torch.Tensor], owner: str) -> None:
    for name, value in tensors.items():
        local = _local(value)
        if local.is_floating_point() and not local.isfinite().all():
            number = (~local.isfinite()).sum().item()
            raise ValueError(f"{owner} has numbers that are not finite: {number} of {local.numel()} in {name}")


def _copied(content: Any) -> Any:
    """A copy with its own tensors, in host memory."""
    if isinstance(content, torch.Tensor):
        return content.detach().clone()
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_copied(value) for value in content)
    return content


@contextmanager
def _refused_in(root: Path) -> Iterator[None]:
    """Inside, any error becomes a ValueError that names the checkpoint."""
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
