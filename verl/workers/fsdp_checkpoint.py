# SPDX-License-Identifier: Apache-2.0
"""Saves and restores one rank's part of a model: three files a rank, in EasyR1's layout and names.

`model_*` holds the state dict under Hugging Face names: DTensor shards, or plain tensors at world size 1. `optim_*`
holds the optimizer's state dict by parameter name, `extra_state_*` the schedule and the random number states. The
folder `huggingface/` beside them holds what says which model this is, so that a merger needs nothing else.

Of a model with low-rank adapters the files hold what trains, the adapters: the weights under them are those of
`model_path`. The folder `lora_adapter/` holds the adapters once more, whole and in peft's own format.
"""

import logging
import random
import shutil
from collections.abc import Callable, Sequence
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
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from verl.models.saved_files import add_legacy_rope, apply_umask
from verl.models.trainable import ADAPTER, adapter_config
from verl.utils.checkpoint import extra_state_file, flush_all, model_file, optim_file
from verl.workers.adamw_bf16 import settle_compensation

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

    def save(self, folder: str, model_only: bool) -> None:
        """Writes this rank's files; returns when every rank has written.

        Args:
            folder: on storage that all nodes see.
            model_only: leaves optimizer and extra state out.
        """
        root = Path(folder)
        if self.rank == 0:
            # What an earlier run left there would be taken for this one's.
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
        dist.barrier()
        torch.save(self._model_state(self.options), root / self._name(model_file))
        if not model_only:
            torch.save(self._optimizer_state(), root / self._name(optim_file))
            extra_state = {"lr_scheduler": self.scheduler.state_dict(), "rng": _random_states()}
            torch.save(extra_state, root / self._name(extra_state_file))
        if self.adapters is not None:
            self._save_adapters(root / "lora_adapter")
        if self.rank == 0:
            for description in self.described_by:
                description.save_pretrained(root / "huggingface")
            add_legacy_rope(root / "huggingface")
        dist.barrier()  # nobody writes any more
        flush_all(root)  # on every machine, its own writes
        dist.barrier()

    def load(self, folder: str, model_only: bool) -> None:
        """Restores this rank's part.

        Args:
            model_only: the checkpoint was saved without optimizer; optimizer and schedule keep their fresh state.

        Raises:
            ValueError: there is no such folder, or it has no file for this rank and world size, or it was sharded over
                groups of another size, or it is of another model or of other adapters than this run's.
        """
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(
                f"{root} does not exist: the run that saved this checkpoint trained no {root.name}; resume with its "
                "algorithm.adv_estimator, or start a run of its own with another trainer.save_checkpoint_path"
            )
        model_path = root / self._name(model_file)
        if not model_path.exists():
            present = sorted(path.name for path in root.glob("model_world_size_*"))
            raise ValueError(
                f"{model_path} does not exist: a checkpoint is resumed with the number of workers that saved it "
                f"(now {self.world_size} = trainer.nnodes * trainer.n_gpus_per_node); the folder has {present}"
            )
        # weights_only=False: shards are DTensors and carry their mesh; the files are the user's own checkpoints.
        model_state = torch.load(model_path, map_location="cpu", weights_only=False)
        self._require_same_model(model_path, model_state)
        saved_size, size = _sharding_group_size(model_state), _sharding_group_size(self.model.state_dict())
        if saved_size != size:
            raise ValueError(
                f"{model_path} was saved in sharding groups of {saved_size} workers, this run's have {size}; "
                f"resume with worker.{root.name}.fsdp.fsdp_size={saved_size}"
            )
        set_model_state_dict(self.model, model_state, options=self.options)
        if model_only:
            return
        optimizer_state = torch.load(root / self._name(optim_file), map_location="cpu", weights_only=False)
        extra_state = torch.load(root / self._name(extra_state_file), map_location="cpu", weights_only=False)
        self._restore_optimizer(optimizer_state, extra_state["lr_scheduler"])
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

    def _save_adapters(self, folder: Path) -> None:
        """For `PeftModel.from_pretrained` and all that reads its format; a collective, rank 0 writes."""
        whole = self._model_state(replace(self.options, full_state_dict=True))
        if self.rank == 0:
            replace(self.adapters, inference_mode=True).save_pretrained(str(folder))
            # The embeddings never change, and finding that out peft would ask the hub.
            weights = get_peft_model_state_dict(self.model, whole, ADAPTER, save_embedding_layers=False)
            prefixed = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
            save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            apply_umask(folder)

    def _require_same_model(self, path: Path, saved: dict[str, torch.Tensor]) -> None:
        """Where weights are left out, as under adapters, nothing else would tell a file that does not fit."""
        own = self.model.state_dict() if self.adapters is None else self._trained()
        differing = sorted(
            name
            for name in own.keys() | saved.keys()
            if name not in own or name not in saved or own[name].shape != saved[name].shape
        )
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

    def _restore_optimizer(self, optimizer_state: dict[str, Any], scheduler_state: dict[str, Any]) -> None:
        """Takes moments and the place in the schedule from the checkpoint, the optimizer and its rates from this run.

        Weights of which the checkpoint has no moments begin without: those that no gradient ever reached, as of a
        vision tower's layer that the model leaves out, and those that were frozen.
        """
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        base_rates = self.scheduler.base_lrs
        if optimizer_state:
            saved_groups = zip(optimizer_state["param_groups"], settings, strict=True)
            groups = [{**setting, "params": saved["params"]} for saved, setting in saved_groups]
            set_optimizer_state_dict(
                self.model,
                self.optimizer,
                {**optimizer_state, "param_groups": groups},
                options=replace(self.options, strict=False),
            )
            names = self.model.named_parameters(remove_duplicate=False)
            known = {parameter for name, parameter in names if name in optimizer_state["state"]}
            for parameter in self.optimizer.state.keys() - known:
                del self.optimizer.state[parameter]  # torch made one up, with a step that never was
            settle_compensation(self.optimizer)
        self.scheduler.load_state_dict({**scheduler_state, "base_lrs": base_rates})
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        for group, setting, rate, factor in zip(
            self.optimizer.param_groups, settings, base_rates, factors, strict=True
        ):
            group.update(setting, lr=rate * factor)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _name(self, file_name: Callable[[int, int], str]) -> str:
        return file_name(self.world_size, self.rank)


def _sharding_group_size(state_dict: dict[str, Any]) -> int:
    """Ranks that share one copy of the model; groups of ranks that repeat it are the mesh's first dimension."""
    return next((value.device_mesh.size(-1) for value in state_dict.values() if isinstance(value, DTensor)), 1)


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
