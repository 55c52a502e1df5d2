# SPDX-License-Identifier: Apache-2.0
"""Rollout with vLLM, in the worker's own process: one engine a worker, or one sharded over a group of workers.

The engine reads the model once, for its architecture and buffers, and takes the policy's weights from the stream
before every rollout. Nothing else in the package knows vLLM, and but for what a killed run leaves on a CPU machine
nothing here goes past its public interface.

Shapes: B prompts, n responses each, N = B * n, R response length.
"""

import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.workers.rollout.vllm_environment import tell_of_numa_nodes  # before vLLM

# Read when vLLM is imported. In process, so that the weight stream can be handed over as it is.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from vllm import LLM, RequestOutput, SamplingParams

from verl.data.features import Featurizer
from verl.data.vision import MediaHandle
from verl.models.loader import DTYPES, load_generation_config, load_model_config
from verl.models.registry import checkpoint_name, family_of, media_token_ids
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.utils.tokenizer import eos_token_ids_of
from verl.workers.rollout.base import (
    Rollout,
    Sampling,
    assemble_batch,
    draw_seed,
    mask_responses,
    require_videos,
)
from verl.workers.rollout.config import RolloutConfig

SEQUENCES_AT_ONCE_ON_CPU = 128
BANNED = -100.0
"""The strongest bias that vLLM takes, added to a logit before the temperature divides it."""


@dataclass(frozen=True)
class Request:
    """One prompt: ids with a single placeholder for each medium, its media, and the seed of its responses."""

    prompt_token_ids: list[int]
    media: list[MediaHandle]
    seed: int


class VLLMRollout(Rollout):
    """Generates with vLLM.

    Args:
        llm: the engine, in this process.
        config: `worker.rollout`.
        response_length: R, tokens.
        eos_token_ids: tokens that end a response.
        pad_token_id: fills responses on the right.
        banned_token_ids: placeholders of media, which no response may hold.
        model_config: of the policy.
        sleeps: whether the engine gives its memory back between rollouts, as it can on CUDA only.
    """

    def __init__(
        self,
        llm: LLM,
        config: RolloutConfig,
        response_length: int,
        eos_token_ids: list[int],
        pad_token_id: int,
        banned_token_ids: list[int],
        model_config: PretrainedConfig,
        sleeps: bool,
    ) -> None:
        self.llm = llm
        self.config = config
        self.response_length = response_length
        self.eos_token_ids = eos_token_ids
        self.pad_token_id = pad_token_id
        self.banned_token_ids = banned_token_ids
        self.model_config = model_config
        (self.has_head,) = llm.apply_model(_has_head)
        self.sleeps = sleeps

    @classmethod
    def from_config(
        cls,
        config: PPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        featurizer: Featurizer | None,
        device: torch.device,
        with_videos: bool = False,
    ) -> "VLLMRollout":
        """Starts the engine. On CUDA it falls asleep at once, so that it holds no memory until the first rollout.

        Raises what vLLM raises where the engine cannot start, and ValueError for a family that vLLM computes otherwise
        than transformers and for a mixture of experts on a CPU.
        """
        model, rollout = config.worker.actor.model, config.worker.rollout
        model_config = load_model_config(model)
        family = family_of(model_config)
        if family.attends_both_ways:
            # Measured: log-probabilities of rows with images are off by 0.2.
            raise ValueError(
                f"worker.rollout.name=vllm reads images with models of the family {family.name} otherwise than the "
                "trainer; use worker.rollout.name=hf"
            )
        if device.type == "cpu" and getattr(model_config.get_text_config(), "num_experts", 0):
            # vLLM's CPU build packs experts for its kernel when it first loads them, and never again.
            raise ValueError(
                f"worker.rollout.name=vllm would go on with the first weights of {model.model_path}'s experts on a "
                "CPU; use worker.rollout.name=hf there"
            )
        if device.type == "cpu":
            tell_of_numa_nodes()
        sleeps = device.type == "cuda"
        if rollout.tensor_parallel_size > 1 and device.type == "cpu":
            _remove_segments_left_behind(_group_of_this_rank(rollout.tensor_parallel_size))
        with _random_state_kept(device):  # starting an engine seeds every generator of the process
            llm = LLM(
                model.model_path,
                tokenizer=model.tokenizer_path,
                trust_remote_code=model.trust_remote_code,
                hf_overrides={k: v for k, v in model.override_config.items() if k != "attn_implementation"},
                # "vllm": the checkpoint's own sampling settings stay out; what is drawn is what the config says.
                generation_config="vllm",
                dtype=DTYPES[rollout.dtype],
                seed=rollout.seed,
                max_model_len=rollout.max_model_len or config.data.max_prompt_length + config.data.max_response_length,
                max_num_batched_tokens=rollout.max_num_batched_tokens,
                enable_chunked_prefill=rollout.enable_chunked_prefill,
                use_tqdm_on_load=False,
                enforce_eager=rollout.enforce_eager or device.type == "cpu",
                disable_log_stats=rollout.disable_log_stats,
                # Log-probabilities of the distribution that is drawn from, after temperature and filters.
                logprobs_mode="processed_logprobs",
                tensor_parallel_size=rollout.tensor_parallel_size,
                # The workers of a group are processes that exist already, each with an engine of its own that
                # schedules the same requests in the same order.
                distributed_executor_backend="external_launcher",
                **_all_reduce_options(rollout.tensor_parallel_size),
                **_media_options(model_config, featurizer.processor if with_videos else None, rollout, device),
                **_memory_options(model_config, config, device),
            )
        engine = cls(
            llm,
            rollout,
            config.data.max_response_length,
            eos_token_ids_of(load_generation_config(model.model_path, model_config), tokenizer),
            tokenizer.pad_token_id,
            media_token_ids(model_config),
            model_config,
            sleeps,
        )
        engine.sleep()
        return engine

    def wake_weights(self) -> None:
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        # The iterator crosses no process boundary: the engine draws from it and holds a layer until it is complete.
        stream = as_in_checkpoints(weights, self.model_config, self.has_head)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream, "is_checkpoint_format": True})
        # What was computed with the old weights must not be found again. Reloading empties the worker's encoder
        # cache but not the scheduler's book of it, and the next image would be looked for in vain.
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def wake_cache(self) -> None:
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> None:
        if self.sleeps:
            # Level 1 keeps the weights in host memory, and so whatever the stream does not carry: level 2 would lose
            # tensors that are neither parameters nor buffers, such as Qwen3-VL's deepstack inputs.
            self.llm.sleep(level=1)

    def generate(self, prompts: DataProto, sampling: Sampling, seed: int) -> DataProto:
        outputs = self._outputs(self._requests(prompts, seed), sampling)
        for row, output in enumerate(outputs):
            is_token = prompts.batch["attention_mask"][row].bool()
            seen, expected = output.prompt_token_ids, prompts.batch["input_ids"][row][is_token].tolist()
            if seen != expected:
                raise RuntimeError(
                    f"vLLM reads prompt {row} as {len(seen)} tokens, the policy as {len(expected)}: their processors "
                    "resize images differently; worker.actor.model.model_path and tokenizer_path must hold the same "
                    "processor"
                )
        completions = [completion for output in outputs for completion in output.outputs]
        assert len(completions) == len(prompts) * sampling.n
        device = prompts.batch["input_ids"].device
        responses = torch.full((len(completions), self.response_length), self.pad_token_id, device=device)  # (N, R)
        log_probs = torch.zeros(responses.shape, dtype=torch.float32, device=device)  # (N, R)
        for row, completion in enumerate(completions):
            length = len(completion.token_ids)
            responses[row, :length] = torch.as_tensor(completion.token_ids, device=device)
            # Flat, one number a position: with logprobs=0 that of the drawn token.
            log_probs[row, :length] = torch.as_tensor(completion.logprobs.logprobs, device=device)
        response_mask = mask_responses(responses, self.eos_token_ids, sampling.ignore_eos)
        return assemble_batch(prompts, responses, response_mask, log_probs, sampling.n)

    def _requests(self, prompts: DataProto, seed: int) -> list[Request]:
        streams = prompts.non_tensor_batch
        rows = zip(streams["raw_prompt_ids"], streams["multi_modal_data"], strict=True)
        if any(handle.is_video for media in streams["multi_modal_data"] for handle in media or []):
            require_videos("vllm", family_of(self.model_config))
        return [Request(list(ids), list(media or []), draw_seed(seed, row)) for row, (ids, media) in enumerate(rows)]

    def _outputs(self, requests: list[Request], sampling: Sampling) -> list[RequestOutput]:
        inputs: list[dict[str, Any]] = []
        for request in requests:
            media = {"multi_modal_data": _media_of(request)} if request.media else {}
            inputs.append({"prompt_token_ids": request.prompt_token_ids, **media})
        with _random_state_kept(torch.device("cpu")):
            return self.llm.generate(
                inputs,
                [self._sampling_params(sampling, request.seed) for request in requests],
                use_tqdm=not self.config.disable_tqdm,
            )

    def _sampling_params(self, sampling: Sampling, seed: int) -> SamplingParams:
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            max_tokens=self.response_length,
            # The ends are given here, so that both engines stop at the same ones.
            ignore_eos=True,
            stop_token_ids=None if sampling.ignore_eos else self.eos_token_ids,
            logit_bias=dict.fromkeys(self.banned_token_ids, BANNED) or None,
            logprobs=0,  # of the drawn token alone
            flat_logprobs=True,
            detokenize=False,
        )


def as_in_checkpoints(
    weights: Iterable[tuple[str, torch.Tensor]], model_config: PretrainedConfig, has_head: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights as a checkpoint of the model has them, which is what the engine's loaders read.

    Args:
        weights: by Hugging Face name.
        model_config: of the policy; it says which names differ, and which weights have dimensions swapped.
        has_head: False leaves `lm_head.weight` out, tied to the embeddings, which bring its values.
    """
    transposed_weights = family_of(model_config).transposed_weights
    for name, value in weights:
        if name == "lm_head.weight" and not has_head:
            continue
        yield (
            checkpoint_name(model_config, name),
            value.transpose(-1, -2) if name.endswith(transposed_weights) else value,
        )


def _has_head(model: nn.Module) -> bool:
    """Whether the model has an output layer of its own by name, though its values may be tied to the embeddings."""
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return any(name.endswith("lm_head.weight") for name in names)


def _media_of(request: Request) -> dict[str, Any]:
    """A prompt's media by kind; videos as frames that are chosen already, with their times."""
    loaded = [(handle.is_video, handle.load()) for handle in request.media]
    images = [medium for is_video, medium in loaded if not is_video]
    videos = [
        (video.frames, {**video.outline.metadata, "do_sample_frames": False}) for is_video, video in loaded if is_video
    ]
    return {kind: media for kind, media in (("image", images), ("video", videos)) if media}


def _media_options(
    model_config: PretrainedConfig,
    video_processor: ProcessorMixin | None,
    rollout: RolloutConfig,
    device: torch.device,
) -> dict[str, Any]:
    """video_processor: the processor, where prompts may have videos."""
    if not family_of(model_config).has_vision_tower:
        return {}
    limits = {} if video_processor is not None else {"video": 0}
    if rollout.limit_images > 0:
        limits["image"] = rollout.limit_images
    # Every prompt's images are new: keeping processed ones would only take host memory.
    options = {
        "limit_mm_per_prompt": limits,
        "mm_processor_cache_gb": 0,
        "skip_mm_profiling": device.type == "cpu",
    }
    if video_processor is not None and not _normalises_alike(video_processor):
        # On its device vLLM would normalise videos as the image processor says.
        options["mm_device_do_normalize"] = False
    return options


def _normalises_alike(processor: ProcessorMixin) -> bool:
    of_images, of_videos = processor.image_processor, processor.video_processor
    return all(
        list(getattr(of_images, name)) == list(getattr(of_videos, name)) for name in ("image_mean", "image_std")
    )


def _all_reduce_options(tensor_parallel_size: int) -> dict[str, Any]:
    """Leaves all-reduces to NCCL: vLLM's own, and the one that it fuses with norms, need every GPU of a group to be
    visible in each process, and Ray shows each its own. `WORKER_ENVIRONMENT` turns further ones off."""
    if tensor_parallel_size == 1:
        return {}
    return {
        "disable_custom_all_reduce": True,
        "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
    }


def _memory_options(model_config: PretrainedConfig, config: PPOConfig, device: torch.device) -> dict[str, Any]:
    """On a GPU vLLM takes its share and sleeps between rollouts. On a CPU, where it would take most of the machine,
    the cache gets room for `SEQUENCES_AT_ONCE_ON_CPU` whole sequences, or the share of what is free, if that is less.
    """
    rollout = config.worker.rollout
    if device.type == "cuda":
        return {"gpu_memory_utilization": rollout.gpu_memory_utilization, "enable_sleep_mode": True}
    text = model_config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size  # keys and values
    length = rollout.max_model_len or config.data.max_prompt_length + config.data.max_response_length
    wanted = SEQUENCES_AT_ONCE_ON_CPU * length * numbers_per_token * DTYPES[rollout.dtype].itemsize
    free = psutil.virtual_memory().available / config.trainer.n_gpus_per_node
    return {
        "kv_cache_memory_bytes": int(min(wanted, rollout.gpu_memory_utilization * free)),
        "max_num_seqs": SEQUENCES_AT_ONCE_ON_CPU,
    }


def _group_of_this_rank(size: int) -> dist.ProcessGroup:
    """The gloo group of `size` consecutive ranks that this one belongs to; a collective of all ranks."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(first, first + size)), backend="gloo") for first in range(0, world_size, size)]
    return groups[rank // size]


def _remove_segments_left_behind(group: dist.ProcessGroup) -> None:
    """Where a group's engines meet on a CPU is named after its ranks alone, and stays when they are killed: the next
    run on the machine would find it taken.

    https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/distributed/device_communicators/cpu_communicator.py
    """
    if dist.get_rank(group) == 0:
        ranks = "-".join(map(str, dist.get_process_group_ranks(group)))
        for segment in Path("/dev/shm").glob(f"*-tp:0-[[]{ranks}]-cpushm_*"):
            segment.unlink(missing_ok=True)
    dist.barrier(group)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
