# SPDX-License-Identifier: Apache-2.0
"""The worker's remote surface: builds the parts a device needs and passes calls on to them, no more.

Shapes: N sequences over all ranks, R response length. Batches arrive as this rank's rows.
"""

import logging
from contextlib import AbstractContextManager

import psutil
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from verl.models.loader import DTYPES, keep_vision_tower_in_step, load_model
from verl.models.registry import media_token_ids
from verl.protocol import DataProto
from verl.single_controller.dispatch import DP_COMPUTE_METRIC, DP_COMPUTE_PROTO, ONE_TO_ALL, register
from verl.single_controller.worker import Worker
from verl.trainer.config import PPOConfig
from verl.utils.attention_metrics import KeyVocabulary
from verl.utils.batch_plan import BatchPlan
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.actor.config import FSDPConfig
from verl.workers.actor.dp_actor import (
    DataParallelPPOActor,
    compute_log_probs,
    compute_log_probs_and_attention,
)
from verl.workers.actor.forward import PolicyForward
from verl.workers.fsdp2 import build_mesh, build_optimizer, build_scheduler, resident, shard_model
from verl.workers.fsdp_checkpoint import FSDPCheckpoint
from verl.workers.rollout.base import Sampling, draw_seed
from verl.workers.rollout.hf_rollout import HFRollout
from verl.workers.weight_sync import stream_weights

logger = logging.getLogger(__name__)

GIBIBYTE = 2**30


class FSDPWorker(Worker):
    """Actor, rollout engine and, if KL is on, reference policy on one device.

    Args:
        config: of the run.
        plan: its batch numbers.
        training_steps: length of the run, for the learning-rate schedule.
        **place: rank, world_size, local_rank, device.
    """

    def __init__(self, config: PPOConfig, plan: BatchPlan, training_steps: int, **place) -> None:
        super().__init__(**place)
        self.config = config
        self.plan = plan
        self.training_steps = training_steps
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    @register(ONE_TO_ALL)
    def init_model(self) -> None:
        """Loads and shards the policy, its optimizer, the rollout engine and, if KL is on, the reference."""
        actor = self.config.worker.actor
        source = (actor.model.tokenizer_path, self.config.data.override_chat_template)
        self.tokenizer = get_tokenizer(*source, trust_remote_code=actor.model.trust_remote_code)
        self.processor = get_processor(*source, trust_remote_code=actor.model.trust_remote_code)
        self.mesh = build_mesh(self.device)

        self.model = self._load_sharded(actor.fsdp, default_dtype="fp32")
        if actor.model.enable_gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = build_optimizer(self.model, actor.optim)
        self.scheduler = build_scheduler(self.optimizer, actor.optim, self.training_steps)
        self.actor = DataParallelPPOActor(
            self.config, self.plan, self._forward_of(self.model), self.optimizer, self.scheduler
        )
        self.checkpoint = FSDPCheckpoint(
            self.model, self.optimizer, self.scheduler, self.processor or self.tokenizer
        )
        self.rollout = self._build_rollout()
        self.vocabulary: KeyVocabulary | None = None
        if self.config.worker.rollout.collect_attentions:
            self.vocabulary = KeyVocabulary.of(self.model.config, self.processor or self.tokenizer)
        if not self.config.algorithm.disable_kl:
            self.ref_model = self._load_sharded(self.config.worker.ref.fsdp, default_dtype="bf16")
            self.ref_model.requires_grad_(False)
            with self._reference_resident():
                pass  # from here on it rests where it does between phases, and so does the actor
        with self._actor_resident(optimizer=True):
            pass

    def _load_sharded(self, fsdp: FSDPConfig, default_dtype: str) -> nn.Module:
        dtype = DTYPES[fsdp.torch_dtype or default_dtype]
        model = load_model(self.config.worker.actor.model, dtype, DTYPES[fsdp.mp_param_dtype])
        keep_vision_tower_in_step(model)
        shard_model(model, self.mesh, fsdp)
        return model

    def _forward_of(self, model: nn.Module) -> PolicyForward:
        return PolicyForward(
            model,
            self.processor,
            self.config.worker.rollout.temperature,
            media_token_ids(model.config),
            self.device,
        )

    def _build_rollout(self) -> HFRollout:
        # Read once more rather than copied from the shards: the buffers (rope) come out right, the weights are
        # replaced at the first sync.
        rollout = self.config.worker.rollout
        return HFRollout(
            load_model(self.config.worker.actor.model, DTYPES[rollout.dtype], DTYPES[rollout.dtype]),
            self.tokenizer,
            self.processor,
            rollout,
            self.config.data.max_response_length,
            self.device,
        )

    def _actor_resident(self, optimizer: bool = False) -> AbstractContextManager:
        offload = self.config.worker.actor.offload
        return resident(
            self.device,
            model=self.model if offload.offload_params else None,
            optimizer=self.optimizer if optimizer and offload.offload_optimizer else None,
        )

    def _reference_resident(self) -> AbstractContextManager:
        ref = self.config.worker.ref
        # FSDP's own CPU offload fetches each layer by itself.
        moves = ref.offload.offload_params and not ref.fsdp.enable_cpu_offload
        return resident(self.device, model=self.ref_model if moves else None)

    @register(ONE_TO_ALL)
    def prepare_rollout_engine(self) -> None:
        """Wakes the engine and gives it the current policy."""
        self.rollout.wake()
        with self._actor_resident():
            self.rollout.update_weights(stream_weights(self.model))

    @register(ONE_TO_ALL)
    def release_rollout_engine(self) -> None:
        """Takes the engine's memory back for training."""
        self.rollout.sleep()

    @register(DP_COMPUTE_PROTO)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Responses for this rank's prompts, as `Rollout.generate` returns them.

        Args:
            prompts: meta `sampling` (a `Sampling`) and `seed_parts` (ints that name this draw within the run).
        """
        sampling: Sampling = prompts.meta_info["sampling"]
        seed = draw_seed(self.config.worker.rollout.seed, *prompts.meta_info["seed_parts"], self.rank)
        return self.rollout.generate(prompts, sampling, seed)

    @register(DP_COMPUTE_PROTO)
    def compute_log_probs(self, data: DataProto) -> DataProto:
        """Adds `old_log_probs` (N, R): the current policy's, before this step's update.

        With `worker.rollout.collect_attentions` also, from the same passes, `attention_mass` (N, R, 2): each response
        token's attention on the prompt's text and on its images; and `attention_keys` (N, 2): how many tokens each of
        the two has.
        """
        arguments = (self.actor.forward, data, self.plan.experience_micro_batch_size)
        with self._actor_resident():
            if self.vocabulary is None:
                return DataProto.from_dict({"old_log_probs": compute_log_probs(*arguments)})
            log_probs, mass, keys = compute_log_probs_and_attention(
                *arguments, self.vocabulary, self.config.algorithm.token_weight_last_k_layers
            )
        return DataProto.from_dict({"old_log_probs": log_probs, "attention_mass": mass, "attention_keys": keys})

    @register(DP_COMPUTE_PROTO)
    def compute_ref_log_probs(self, data: DataProto) -> DataProto:
        """Adds `ref_log_probs` (N, R): those of the policy the run began with."""
        with self._reference_resident():
            log_probs = compute_log_probs(
                self._forward_of(self.ref_model), data, self.plan.experience_micro_batch_size
            )
        return DataProto.from_dict({"ref_log_probs": log_probs})

    @register(DP_COMPUTE_METRIC)
    def update_actor(self, data: DataProto) -> dict[str, float]:
        """One training step on this rank's rows; returns `actor/*` and `perf/*memory*` metrics."""
        with self._actor_resident(optimizer=True):
            metrics = self.actor.update_policy(data)
        return {**metrics, **self._memory_metrics()}

    def _memory_metrics(self) -> dict[str, float]:
        metrics = {"perf/cpu_memory_used_gb": psutil.virtual_memory().used / GIBIBYTE}
        if self.device.type == "cuda":
            metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / GIBIBYTE
            metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / GIBIBYTE
        return metrics

    @register(ONE_TO_ALL)
    def save_checkpoint(self, folder: str, model_only: bool) -> None:
        """Writes this rank's part of `<checkpoint>/actor`."""
        with self._actor_resident(optimizer=True):
            self.checkpoint.save(folder, model_only)

    @register(ONE_TO_ALL)
    def load_checkpoint(self, folder: str, model_only: bool) -> None:
        """Restores this rank's part of `<checkpoint>/actor`."""
        with self._actor_resident(optimizer=True):
            self.checkpoint.load(folder, model_only)
