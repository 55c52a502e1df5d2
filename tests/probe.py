# SPDX-License-Identifier: Apache-2.0
"""The real worker with a few windows into it, for tests that compare numbers across ranks."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.collectives import hold_collectives_to_nccl
from tests.pool import shared_processes
from verl.algorithms.policy_loss import POLICY_LOSSES
from verl.algorithms.token_weights import measured_streams
from verl.models.loader import load_model, load_value_model
from verl.protocol import DataProto
from verl.single_controller.dispatch import DP_COMPUTE_METRIC, DP_COMPUTE_PROTO, ONE_TO_ALL, register
from verl.single_controller.worker_group import WorkerGroup
from verl.single_controller.worker_processes import WorkerProcesses
from verl.trainer.config import PPOConfig, load_config
from verl.utils.batch_plan import BatchPlan
from verl.workers.actor.config import FSDPConfig, ModelConfig
from verl.workers.fsdp2 import full_tensor
from verl.workers.fsdp_workers import FSDPWorker
from verl.workers.rollout.base import Sampling
from verl.workers.trained_model import TrainedModel
from verl.workers.weight_sync import stream_weights

RESPONSE_LENGTH = 12
RESPONSES_PER_PROMPT = 2

WITH_CRITIC = (
    "algorithm.adv_estimator=gae",
    "worker.critic.global_batch_size=4",
    "worker.critic.micro_batch_size_per_device_for_update=8",
    "worker.critic.micro_batch_size_per_device_for_experience=4",
    "worker.critic.fsdp.mp_param_dtype=fp32",
)
"""What `make_config` needs beside for a run with a critic."""


class ProbeWorker(FSDPWorker):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.world_size > 1:
            hold_collectives_to_nccl()

    @register(DP_COMPUTE_METRIC, shared_by="actor")
    def gradients(
        self, mini_batch: DataProto, mode: str, loss_type: str = "default", **settings: float
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The whole gradient by parameter name, and the loss metrics, of one mini-batch under a `loss_avg_mode`.

        Token weights and importance weights are on where the mini-batch has them. `settings` are keys of
        `worker.actor`.
        """
        streams, config = mini_batch.batch.keys(), self.config
        objective = self.actor.objective
        objective.config = replace(config.worker.actor, loss_avg_mode=mode, **settings)
        objective.algorithm = replace(config.algorithm, enable_token_weights="token_weights" in streams)
        objective.has_importance_weights = "importance_weights" in streams
        objective.policy_loss = POLICY_LOSSES[loss_type]
        with self.actor.resident(), self._reference_resident():
            return gradients_of(self.actor, mini_batch)

    @register(DP_COMPUTE_PROTO, shared_by="actor")
    def measured(self, data: DataProto, wanted: list[str]) -> DataProto:
        """The policy's streams of the names in `wanted`."""
        with self.actor.resident():
            return DataProto.from_dict(self.actor.forward.measure_all(data, wanted, micro_batch_size=4))

    @register(DP_COMPUTE_METRIC, shared_by="critic")
    def critic_gradients(self, mini_batch: DataProto, mode: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The same of the critic."""
        self.critic.objective.config = replace(self.config.worker.critic, loss_avg_mode=mode)
        with self.critic.resident():
            return gradients_of(self.critic, mini_batch)

    @register(ONE_TO_ALL)
    def fill_value_head(self) -> None:
        """Random numbers, the same on any number of ranks, in place of the zeros that pass no gradient on."""
        generator = torch.Generator().manual_seed(0)
        head = self.critic.model.value_head
        values = {
            "value_head.weight": torch.randn(1, head.in_features, generator=generator),
            "value_head.bias": torch.randn(1, generator=generator),
        }
        options = StateDictOptions(full_state_dict=True, strict=False)
        with self.critic.resident():
            set_model_state_dict(self.critic.model, values, options=options)

    @register(ONE_TO_ALL)
    def restart(self, config: PPOConfig) -> None:
        """Builds everything anew, for a run with another configuration on the same ranks."""
        self.config, self.plan = config, BatchPlan.from_config(config, self.world_size)
        self.signal_streams = measured_streams(config.algorithm, config.worker.rollout.collect_attentions)
        self.init_model()

    @register(ONE_TO_ALL)
    def tensors_of(self, paths: list[str], fsdp: FSDPConfig, with_critic: bool) -> dict[str, torch.Tensor]:
        """Parameters and buffers, whole, of a model that each rank loads from its own of `paths`; tied ones twice."""
        load = load_value_model if with_critic else load_model
        model = self._load_sharded(load, ModelConfig(model_path=paths[self.rank]), fsdp, "fp32", group=None)
        parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers()
        return {name: full_tensor(tensor).detach().clone() for name, tensor in (*parameters, *buffers)}

    @register(ONE_TO_ALL)
    def scale_weights(self, factor: float) -> None:
        """Takes the policy away from its reference."""
        with torch.no_grad():
            for parameter in self.actor.model.parameters():
                parameter.mul_(factor)

    @register(ONE_TO_ALL)
    def weights(self, trained: str = "actor") -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in stream_weights(self.trained[trained].model)}

    @register(ONE_TO_ALL)
    def states(self, trained: str = "actor") -> dict[str, torch.Tensor]:
        """The optimizer's, whole, by parameter and name."""
        model, optimizer = self.trained[trained].model, self.trained[trained].optimizer
        return {
            f"{name}.{key}": full_tensor(value).clone()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    @register(ONE_TO_ALL)
    def set_weight(self, name: str, rows: list[int], values: torch.Tensor) -> None:
        """Puts `values` (columns,) into some rows of a weight of the policy."""
        parameter = self.actor.model.get_parameter(name)
        whole = full_tensor(parameter).detach().clone()
        whole[rows] = values.to(whole.device)
        self._set(parameter, whole)

    @register(ONE_TO_ALL)
    def shift_weights(self, seed: int) -> None:
        """Adds noise to every weight of the policy that trains, the same on all ranks."""
        trainable = (parameter for parameter in self.actor.model.parameters() if parameter.requires_grad)
        for index, parameter in enumerate(trainable):
            generator = torch.Generator().manual_seed(seed + index)
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            whole = full_tensor(parameter).detach()
            self._set(parameter, whole + noise.to(whole.device))

    @torch.no_grad()
    def _set(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        is_sharded = isinstance(parameter, DTensor)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements) if is_sharded else whole)

    @register(ONE_TO_ALL)
    def random_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    @register(ONE_TO_ALL)
    def draw_random(self, count: int) -> list[list[float]]:
        """Numbers from the process's own generators: torch's, numpy's and Python's."""
        return [torch.rand(count).tolist(), np.random.rand(count).tolist(), [random.random() for _ in range(count)]]

    @register(ONE_TO_ALL)
    def pixels_of_engine(self, prompts: DataProto, sampling: Sampling) -> torch.Tensor:
        """What enters vLLM's vision tower while it answers: (patches, patch size), normalised."""
        seen = []

        def keep(module: torch.nn.Module, args: tuple, normalised: torch.Tensor) -> None:
            seen.append(normalised.float())

        (hook,) = self.rollout.llm.apply_model(lambda model: model.visual.input_norm.register_forward_hook(keep))
        try:
            self.rollout.generate(prompts, sampling, seed=0)
        finally:
            hook.remove()
        return torch.cat(seen)

    @register(ONE_TO_ALL)
    def pixels_of_actor(self, prompts: DataProto) -> torch.Tensor:
        """(patches, patch size): what enters the policy's vision tower."""
        media = prompts.non_tensor_batch["multi_modal_data"]
        return self.featurizer.featurize(media)["pixel_values"]

    @register(ONE_TO_ALL)
    def places(self) -> dict[str, set[str]]:
        """The devices on which the policy rests between phases."""
        model, optimizer = self.actor.model, self.actor.optimizer
        states = [value for state in optimizer.state.values() for value in state.values()]
        tensors = {"parameters": model.parameters(), "states": states, "buffers": model.buffers()}
        return {name: {value.device.type for value in values} for name, values in tensors.items()}

    @register(ONE_TO_ALL)
    def rollout_weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone().cpu() for name, value in self.rollout.model.state_dict().items()}


def gradients_of(trained: TrainedModel, mini_batch: DataProto) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    trained.model.train()
    metrics = trained.accumulate_gradients(mini_batch)
    gradients = {
        name: full_tensor(parameter.grad).cpu()
        for name, parameter in trained.model.named_parameters()
        if parameter.grad is not None  # some towers have weights that no forward reads
    }
    trained.optimizer.zero_grad()
    return gradients, metrics


def without_clock(metrics: dict[str, float]) -> dict[str, float]:
    """Those metrics of an update that the same update always has."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def make_config(model_path: str, *overrides: str) -> PPOConfig:
    return load_config(
        [
            "data.rollout_batch_size=4",
            "data.max_prompt_length=96",
            f"data.max_response_length={RESPONSE_LENGTH}",
            "algorithm.use_kl_loss=true",
            "algorithm.kl_penalty=low_var_kl",
            "algorithm.kl_coef=0.1",
            f"worker.actor.model.model_path={model_path}",
            "worker.actor.global_batch_size=4",
            "worker.actor.micro_batch_size_per_device_for_update=8",
            "worker.actor.micro_batch_size_per_device_for_experience=4",
            "worker.actor.fsdp.mp_param_dtype=fp32",
            "worker.ref.fsdp.mp_param_dtype=fp32",
            "worker.ref.fsdp.torch_dtype=fp32",
            "worker.rollout.name=hf",
            f"worker.rollout.n={RESPONSES_PER_PROMPT}",
            "worker.rollout.dtype=fp32",
            *overrides,
        ]
    )


def start_alone(config: PPOConfig) -> ProbeWorker:
    """One rank in this process; needs the `lone_process_group` fixture."""
    worker = ProbeWorker(**run_of(config, 1), rank=0, world_size=1, local_rank=0, device="cpu")
    worker.init_model()
    return worker


def run_of(config: PPOConfig, num_workers: int) -> dict[str, Any]:
    """What a worker is told of its run."""
    plan, policy_loss = BatchPlan.from_config(config, num_workers), POLICY_LOSSES[config.worker.actor.loss_type]
    measured = measured_streams(config.algorithm, config.worker.rollout.collect_attentions)
    return {
        "config": config,
        "plan": plan,
        "policy_loss": policy_loss,
        "signal_streams": measured,
        "training_steps": 10,
    }


def start_two(config: PPOConfig) -> WorkerGroup:
    return start_group(config, 2)


def start_group(
    config: PPOConfig, num_workers: int, processes: WorkerProcesses | None = None, **options: Any
) -> WorkerGroup:
    """Ranks in processes of their own, shared ones unless some are given; needs the `ray_cluster` fixture."""
    run = run_of(config, num_workers) | options
    group = WorkerGroup(processes or shared_processes(num_workers), ProbeWorker, run["plan"].shares, **run)
    group.init_model()
    return group
