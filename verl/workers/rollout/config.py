# SPDX-License-Identifier: Apache-2.0
"""Configuration of generation: the engine, how it samples and how much memory it takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from verl.config import ConfigSection, ConfigValueError
from verl.workers.actor.config import Dtype

VALIDATION_SETTINGS: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "n": ((int,), lambda value: value >= 1, "a whole number above 0"),
    "temperature": ((int, float), lambda value: 0 <= value < math.inf, "a number, 0 (greedy) or above"),
    "top_p": ((int, float), lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "top_k": ((int,), lambda value: value >= -1, "a whole number not below -1"),
    "ignore_eos": ((bool,), lambda value: True, "true or false"),
}
"""Settings that `val_override_config` takes: types, a check of the range, and both in words."""


ENGINES = {
    "hf": "verl.workers.rollout.hf_rollout:HFRollout",
    "vllm": "verl.workers.rollout.vllm_rollout:VLLMRollout",
}
"""Path of the class for each `worker.rollout.name`; imported only when used, since engines load slowly."""

VARIABLES_ON_CPUS = {"vllm": {"TORCH_CPP_LOG_LEVEL": "ERROR"}}
"""By engine: what the environment of CPU workers has unless the user sets it, read when torch is imported. It quiets
vLLM's C++ warning of the NUMA node that it takes (`vllm_environment.py`)."""


@dataclass(frozen=True)
class RolloutConfig(ConfigSection):
    """How responses are sampled. Prompt and response lengths are `data.max_prompt_length` and `_response_length`."""

    name: Literal["hf", "vllm"] = "vllm"
    """The engine: `vllm`, or `hf`, transformers' own generation, which needs nothing installed and is slower."""
    n: int = 1
    """Responses per prompt."""
    temperature: float = 1.0
    """Divides the logits when sampling and in every log-prob pass."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability."""
    top_k: int = -1
    """Sample from this many most likely tokens; -1 (or 0) from all."""
    seed: int = 1
    """Seed of the sampler."""
    limit_images: int = 0
    """Most images of one prompt, for the engine to plan its memory; 0 leaves that to the engine."""
    dtype: Dtype = "bf16"
    """Precision of the engine's weights."""
    gpu_memory_utilization: float = 0.6
    """Share of the GPU's memory that the engine may take."""
    ignore_eos: bool = False
    """Go on to the full length past the end-of-sequence token."""
    enforce_eager: bool = False
    """Run the engine without CUDA graphs."""
    enable_chunked_prefill: bool = False
    """Let the engine process long prompts in pieces."""
    tensor_parallel_size: int = 2
    """Workers that hold one copy of the engine's model; `hf` shards like the actor and does not read it."""
    max_model_len: int | None = None
    """Longest sequence of the engine in tokens; null is prompt plus response length."""
    max_num_batched_tokens: int = 8192
    """Most tokens in one of the engine's steps."""
    disable_log_stats: bool = True
    """Keep the engine's statistics out of the log."""
    disable_tqdm: bool = False
    """No progress bar while generating."""
    collect_attentions: bool = False
    """Measure, in the log-prob pass after each rollout, how much each response token attends to text and to images."""
    importance_cap: float | None = None
    """Multiply each token's policy loss by trainer probability / engine probability, at most this value (truncated
    importance sampling). null does not correct. 2.0 is usual."""
    val_override_config: dict[str, Any] = field(default_factory=dict)
    """Sampling values for validation, such as `{temperature: 0.6, top_p: 0.95, n: 1}`; n is 1 where not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "n", "tensor_parallel_size", "max_model_len", "max_num_batched_tokens")
        self.require_at_least(0, "limit_images", "seed")
        self.require_at_least(-1, "top_k")
        self.require_above_0("importance_cap")
        remedy = "is not above 0; greedy decoding is for validation, in worker.rollout.val_override_config"
        self.require(self.temperature > 0, "temperature", remedy)
        for key in ("top_p", "gpu_memory_utilization"):
            self.require(0 < getattr(self, key) <= 1, key, "is not above 0 and at most 1")
        for name, value in self.val_override_config.items():
            key = f"val_override_config.{name}"
            if name not in VALIDATION_SETTINGS:
                known = ", ".join(VALIDATION_SETTINGS)
                raise ConfigValueError(key, value, f"is no setting of validation, which takes {known}")
            types, is_in_range, expected = VALIDATION_SETTINGS[name]
            if type(value) not in types or not is_in_range(value):
                raise ConfigValueError(key, value, f"is not {expected}")
        self.refuse_contradictions()
