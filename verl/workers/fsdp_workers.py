# SPDX-License-Identifier: Apache-2.0
"""The worker class: builds the parts on a device and passes remote calls on to them.

Shapes: N sequences over all ranks, R response length. Batches arrive as this rank's rows.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import psutil
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from verl.algorithms.policy_loss import PolicyLoss
from verl.data.features import Featurizer
from verl.data.image_noise import ImageNoise
from verl.models.attention_table import SAMPLES
from verl.models.loader import DTYPES, keep_vision_tower_in_step, load_model, load_value_model
from verl.models.saved_files import GenerationSettings, OriginalFiles
from verl.models.sequence_parallel import SequenceGroup, join_sequence_group, share_rows
from verl.models.trainable import choose_trainable
from verl.protocol import DataProto
from verl.single_controller.dispatch import DP_COMPUTE_METRIC, DP_COMPUTE_PROTO, ONE_TO_ALL, register
from verl.single_controller.worker import Worker
from verl.trainer.config import PPOConfig
from verl.utils.attention_metrics import KeyVocabulary
from verl.utils.batch_plan import BatchPlan
from verl.utils.checkpoint import damaged_checkpoint
from verl.utils.checkpoint_folder import FileRecord, find_changes
from verl.utils.determinism import set_determinism
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.actor.config import FSDPConfig, ModelConfig
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.forward import MAPPED_ROWS, PolicyForward, SignalSettings
from verl.workers.critic.dp_critic import DataParallelPPOCritic
from verl.workers.critic.forward import ValueForward
from verl.workers.fsdp2 import build_mesh, fill_from_rank0, resident, shard_model, whole_tensors
from verl.workers.fsdp_checkpoint import SavesPretrained
from verl.workers.response_forward import Column
from verl.workers.rollout.base import Sampling, draw_seed, engine_class
from verl.workers.trained_model import TrainedModel
from verl.workers.weight_sync import stream_weights

logger = logging.getLogger(__name__)

GIBIBYTE = 2**30


class FSDPWorker(Worker):
    """Actor, rollout engine and, if the run needs them, reference policy and critic on one device.

    Args:
        config: the run's configuration.
        plan: the run's batch plan.
        policy_loss: the loss of `worker.actor.loss_type`. The controller looks it up, since a loss that the user's
            program registers is not registered in this process.
        signal_streams: the streams of the log-prob pass that the run's token signals need; also looked up there.
        training_steps: number of steps of the run, for the learning-rate schedule.
        with_videos: whether the run's data has videos.
        **place: rank, world_size, local_rank, device.
    """

    def __init__(
        self,
        config: PPOConfig,
        plan: BatchPlan,
        policy_loss: PolicyLoss,
        signal_streams: Sequence[str],
        training_steps: int,
        with_videos: bool = False,
        **place,
    ) -> None:
        super().__init__(**place)
        self.config = config
        self.plan = plan
        self.policy_loss = policy_loss
        self.signal_streams = signal_streams
        self.training_steps = training_steps
        self.with_videos = with_videos
        set_determinism(config.trainer.deterministic, config.worker.rollout.seed + self.rank)
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.saving: Future[dict[str, FileRecord]] | None = None
        self.mesh_of_size = cache(lambda fsdp_size: build_mesh(self.device, fsdp_size))
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    @register(ONE_TO_ALL)
    def init_model(self) -> None:
        """Loads and shards the policy, its optimizer, the rollout engine, and reference and critic if there are any.

        Raises:
            ValueError: actor and critic have different vocabularies.
        """
        actor, ref = self.config.worker.actor, self.config.worker.ref
        source = (actor.model.tokenizer_path, self.config.data.override_chat_template)
        self.tokenizer = get_tokenizer(*source, trust_remote_code=actor.model.trust_remote_code)
        self.processor = get_processor(*source, trust_remote_code=actor.model.trust_remote_code)

        self.featurizer: Featurizer | None = None
        if self.processor is not None:
            self.featurizer = Featurizer(self.processor, int(self.config.data.media_cache_gb * GIBIBYTE))
        self.actor_group = join_sequence_group(actor.ulysses_size)
        # A frozen weight is only read: more precision than the computation uses would waste memory.
        policy_dtype = actor.fsdp.mp_param_dtype if actor.model.lora.rank > 0 else "fp32"
        policy = self._load_sharded(load_model, actor.model, actor.fsdp, policy_dtype, self.actor_group)
        algorithm = self.config.algorithm
        if self.config.needs_reference_model:
            self.ref_model = self._load_sharded(load_model, actor.model, ref.fsdp, "bf16", self.actor_group)
            self.ref_model.requires_grad_(False)
            with self._reference_resident():
                pass  # from here on it is where it stays between phases
        elif not algorithm.disable_kl:
            self.ref_model = policy
        self.reference: PolicyForward | None = None
        if not algorithm.disable_kl:
            self.reference = self._forward_of(self.ref_model, is_base=not self.config.needs_reference_model)
        noise = ImageNoise(algorithm.token_weight_image_noise, algorithm.token_weight_image_noise_share)
        vocabulary = KeyVocabulary.of(policy.config, self.processor or self.tokenizer)
        signals = SignalSettings(vocabulary, algorithm.attention_layers, noise)
        pretrained_parts = [policy.config, GenerationSettings(policy.generation_config), self._tokenizer_files()]
        self.actor = DataParallelPPOActor(
            self.config,
            self.plan,
            self._forward_of(policy, reference=self.reference, signals=signals),
            self.policy_loss,
            self.training_steps,
            pretrained_parts,
        )
        self.trained: dict[str, TrainedModel] = {"actor": self.actor}
        self.rollout = engine_class(self.config.worker.rollout.name).from_config(
            self.config, self.tokenizer, self.featurizer, self.device, self.with_videos
        )
        if self.plan.critic is not None:
            self.critic = self._build_critic()
            self.trained["critic"] = self.critic

    def _load_sharded(
        self,
        load: Callable[[ModelConfig, torch.dtype, torch.dtype, bool], nn.Module],
        config: ModelConfig,
        fsdp: FSDPConfig,
        default_dtype: str,
        group: SequenceGroup | None,
    ) -> nn.Module:
        is_sent = fsdp.enable_rank0_init and self.world_size > 1
        dtype, compute_dtype = DTYPES[fsdp.torch_dtype or default_dtype], DTYPES[fsdp.mp_param_dtype]
        model = load(config, dtype, compute_dtype, self.rank == 0 or not is_sent)
        keep_vision_tower_in_step(model)
        if group is not None:
            share_rows(model, group.size, SAMPLES)
        choose_trainable(model, config)
        whole = whole_tensors(model) if is_sent else {}
        shard_model(model, self.mesh_of_size(fsdp.fsdp_size), fsdp)
        if is_sent:
            fill_from_rank0(model, whole, fsdp, self.device)
        return model

    def _build_critic(self) -> DataParallelPPOCritic:
        """The critic reads the actor's token ids and image features, so both must have the same vocabulary."""
        actor, critic = self.config.worker.actor.model, self.config.worker.critic
        source = critic.model.with_default_model(actor)
        if source.model_path != actor.model_path:
            tokenizer = get_tokenizer(source.tokenizer_path, trust_remote_code=source.trust_remote_code)
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(
                    f"worker.critic.model.model_path={source.model_path} has another vocabulary than "
                    f"worker.actor.model.model_path={actor.model_path}; use a model of the actor's family"
                )
        group = join_sequence_group(critic.ulysses_size)
        model = self._load_sharded(load_value_model, source, critic.fsdp, "fp32", group)
        return DataParallelPPOCritic(
            critic,
            self.plan.critic,
            ValueForward(model, self.featurizer, self.device, critic, group),
            self.training_steps,
            pretrained_parts=[model.config, self._tokenizer_files()],
        )

    def _tokenizer_files(self) -> SavesPretrained:
        """Tokenizer and processor files for checkpoints: the original files, unless the template was replaced."""
        loaded = self.processor or self.tokenizer
        if self.config.data.override_chat_template is not None:
            return loaded
        return OriginalFiles(self.config.worker.actor.model.tokenizer_path, loaded)

    def _forward_of(self, model: nn.Module, **roles: Any) -> PolicyForward:
        config = self.config.worker
        common = (self.featurizer, self.device, config.actor, self.actor_group, config.rollout.temperature)
        return PolicyForward(model, *common, **roles)

    def _reference_resident(self) -> AbstractContextManager:
        if not self.config.needs_reference_model:
            return self.actor.resident()
        ref = self.config.worker.ref
        # FSDP's own CPU offload fetches each layer by itself.
        moves = ref.offload.offload_params and not ref.fsdp.enable_cpu_offload
        return resident(self.device, model=self.ref_model if moves else None)

    @register(ONE_TO_ALL)
    def prepare_rollout_engine(self) -> None:
        """Wakes the engine and gives it the current policy; clears the cached media features of the last step."""
        if self.featurizer is not None:
            self.featurizer.clear()
        self.rollout.wake_weights()
        with self.actor.resident():
            self.rollout.update_weights(stream_weights(self.actor.model))
        self.rollout.wake_cache()

    @register(ONE_TO_ALL)
    def release_rollout_engine(self) -> None:
        """Takes the engine's memory back for training."""
        self.rollout.sleep()
        if self.featurizer is not None and self.world_size > 1:
            self.featurizer.clear()  # most rows now move to other workers

    @register(DP_COMPUTE_PROTO, shared_by="engine")
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Responses for the prompts of the ranks that share an engine with this one; see `Rollout.generate`.

        Args:
            prompts: with meta `sampling` (a `Sampling`) and `seed_parts` (ints that identify this draw).
        """
        sampling: Sampling = prompts.meta_info["sampling"]
        engine = self.rank // self.plan.ranks_per_engine
        seed = draw_seed(self.config.worker.rollout.seed, *prompts.meta_info["seed_parts"], engine)
        return self.rollout.generate(prompts, sampling, seed)

    @register(DP_COMPUTE_PROTO, shared_by="actor")
    def compute_log_probs(self, data: DataProto) -> DataProto:
        """Adds `old_log_probs` (N, R): log-probabilities of the current policy, before this step's update.

        The same passes add the run's `signal_streams`, and, if the data has `is_mapped` (N,), `attention_maps` (N,)
        objects of the selected rows; see `PolicyForward`.
        """
        maps = ["attention_maps"] if MAPPED_ROWS in data.batch else []
        with self.actor.resident():
            streams = self._measure_all(self.actor.forward, data, ["log_probs", *self.signal_streams, *maps])
        objects = {name: streams.pop(name) for name in maps}
        return DataProto.from_dict({"old_log_probs": streams.pop("log_probs"), **streams}, objects)

    @register(DP_COMPUTE_PROTO, shared_by="actor")
    def compute_ref_log_probs(self, data: DataProto) -> DataProto:
        """Adds `ref_log_probs` (N, R): log-probabilities of the reference, the policy at the start of the run."""
        with self._reference_resident():
            streams = self._measure_all(self.reference, data, ["log_probs"])
        return DataProto.from_dict({"ref_log_probs": streams["log_probs"]})

    @register(DP_COMPUTE_PROTO, shared_by="actor")
    def compute_ref_kl(self, data: DataProto) -> DataProto:
        """Adds `ref_kl` (N, R): KL of the current policy from the reference, over the whole vocabulary.

        Costs a forward pass of both models.
        """
        with self.actor.resident(), self._reference_resident():
            streams = self._measure_all(self.actor.forward, data, ["kl"])
        return DataProto.from_dict({"ref_kl": streams["kl"]})

    def _measure_all(self, forward: PolicyForward, data: DataProto, wanted: list[str]) -> dict[str, Column]:
        return forward.measure_all(data, wanted, self.plan.actor.experience_micro_batch_size)

    @register(DP_COMPUTE_PROTO, shared_by="critic")
    def compute_values(self, data: DataProto) -> DataProto:
        """Adds `values` (N, R): the critic's values before this step's update."""
        with self.critic.resident():
            streams = self.critic.forward.measure_all(data, ["values"], self.plan.critic.experience_micro_batch_size)
        return DataProto.from_dict(streams)

    @register(DP_COMPUTE_METRIC, shared_by="actor")
    def update_actor(self, data: DataProto) -> dict[str, float]:
        """One training step of the policy on this rank's rows; returns `actor/*` metrics."""
        reference = self._reference_resident() if self.config.algorithm.full_kl_in_loss else nullcontext()
        with self.actor.resident(optimizer=True), reference:
            return self.actor.update_policy(data)

    @register(DP_COMPUTE_METRIC, shared_by="critic")
    def update_critic(self, data: DataProto) -> dict[str, float]:
        """One training step of the critic on this rank's rows; returns `critic/*` metrics."""
        with self.critic.resident(optimizer=True):
            return self.critic.update_critic(data)

    @register(ONE_TO_ALL)
    def skipped_mini_batches(self, model: str) -> list[int]:
        """Indices of the mini-batches in the last update of "actor" or "critic" whose gradient was not finite."""
        return self.trained[model].skipped_mini_batches

    @register(ONE_TO_ALL)
    def memory_metrics(self) -> dict[str, float]:
        """`perf/*` in GiB: memory of this node's processes now, and peak memory of tensors on this device."""
        metrics = {"perf/cpu_memory_used_gb": psutil.virtual_memory().used / GIBIBYTE}
        if self.device.type == "cuda":
            metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / GIBIBYTE
            metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / GIBIBYTE
        return metrics

    @register(ONE_TO_ALL)
    def checkpoint_bytes(self, model_only: bool) -> int:
        """Approximate size in bytes of this rank's files of a checkpoint."""
        return sum(model.checkpoint.num_bytes(model_only) for model in self.trained.values())

    @register(ONE_TO_ALL)
    def save_checkpoint(self, folder: str, model_only: bool, in_background: bool = False) -> None:
        """Writes this rank's part of `<folder>/actor` and, where there is a critic, of `<folder>/critic`.

        In the background, the content is copied to host memory and a thread writes it. Call `saved_files` to learn
        when it is done, and before the next checkpoint.
        """
        parts = []
        for name, model in self.trained.items():
            with model.resident(optimizer=True):
                save = model.checkpoint.copy if in_background else model.checkpoint.save
                parts.append(save(os.path.join(folder, name), model_only))
        self.saving = self.writer.submit(_merged, parts)

    @register(ONE_TO_ALL)
    def saved_files(self, wait: bool) -> dict[str, FileRecord] | None:
        """The files that this rank wrote for the last checkpoint; None while it is still writing, unless `wait`.

        Raises:
            RuntimeError: a file could not be written.
        """
        return self.saving.result() if wait or self.saving.done() else None

    @register(ONE_TO_ALL)
    def load_checkpoint(self, folder: str, model_only: bool) -> None:
        """Restores this rank's part of a checkpoint from any number of ranks.

        Raises:
            ValueError: a file has changed since it was saved, or as in `FSDPCheckpoint.load`.
        """
        if (problem := find_changes(folder, self.rank, self.world_size)) is not None:
            raise damaged_checkpoint(folder, problem)
        for name, model in self.trained.items():
            with model.resident(optimizer=True):
                model.checkpoint.load(os.path.join(folder, name), model_only)


def _merged(parts: list[dict[str, FileRecord] | Callable[[], dict[str, FileRecord]]]) -> dict[str, FileRecord]:
    """The files of several models; parts that are functions are written now."""
    return {name: record for part in parts for name, record in (part() if callable(part) else part).items()}
