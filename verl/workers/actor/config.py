# SPDX-License-Identifier: Apache-2.0
"""Configuration of the trained policy and its frozen reference: model, optimizer, sharding, offload, loss."""

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from verl.config import ConfigSection, looks_local

Dtype = Literal["fp16", "float16", "bf16", "bfloat16", "fp32", "float32"]

LOSS_TYPES = ("default", "gspo", "gspo_token", "cispo", "sapo")
"""The names that `verl/algorithms/policy_loss.py` registers, repeated here so that reading them needs no torch."""


@dataclass(frozen=True)
class LoraConfig(ConfigSection):
    """Low-rank adapters on the policy's linear layers."""

    rank: int = 0
    """Rank of the adapters; above 0 trains them instead of the whole model."""
    alpha: int = 64
    """Scale of the adapters' update, divided by the rank."""
    target_modules: Any = "all-linear"
    """Linear layers that get an adapter: `all-linear`, or names of layers or ends of such names, separated by commas
    or as a YAML list. The output head gets none, nor do experts that a model holds fused into one tensor."""
    exclude_modules: str | None = None
    """Regular expression of the whole names of modules that get none, such as `.*visual.*`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "rank")
        self.require_at_least(1, "alpha")
        names = self.target_modules
        if isinstance(names, str) and "," in names:
            names = [name.strip() for name in names.split(",")]
            self.settle("target_modules", names)
        is_text_or_texts = isinstance(names, str) or (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        )
        self.require(bool(names) and is_text_or_texts, "target_modules", "is not a module name or a list of them")
        try:
            re.compile(self.exclude_modules or "")
        except re.error as error:
            self.require(False, "exclude_modules", f"is not a regular expression: {error}")


@dataclass(frozen=True)
class ModelConfig(ConfigSection):
    """Which model to load and how to hold it in memory."""

    model_path: str | None = None
    """Hub id or local folder of the model; a local folder becomes absolute. A critic without one has the actor's, and
    with it the actor's `tokenizer_path`, `override_config` and `trust_remote_code`."""
    tokenizer_path: str | None = None
    """Hub id or local folder of the tokenizer; null takes `model_path`."""
    override_config: dict[str, Any] = field(default_factory=dict)
    """Values put over the model's own configuration."""
    enable_gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, with all the rights of the run; EasyR1's default is true. False
    refuses a model that cannot be loaded without its own."""
    freeze_vision_tower: bool = False
    """Leave the vision encoder as it is: no gradient, no optimizer state, no adapter."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("model_path", "tokenizer_path"):
            path = getattr(self, key)
            if path is not None and (looks_local(path) or os.path.exists(path)):
                self.settle_path(key, "folder")
        if self.tokenizer_path is None:
            self.settle("tokenizer_path", self.model_path)

    def with_default_model(self, other: Self) -> Self:
        """This section if it has a `model_path`; otherwise with the path and the loading options of `other`."""
        if self.model_path:
            return self
        keys = ("model_path", "tokenizer_path", "override_config", "trust_remote_code")
        return replace(self, **{key: getattr(other, key) for key in keys})


@dataclass(frozen=True)
class OptimConfig(ConfigSection):
    """AdamW and its learning-rate schedule, which advances once per training step that updates the model.

    The actor's stands still before step `trainer.critic_warmup`, so that the run ends that much before the schedule.
    """

    lr: float = 1e-6
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    strategy: Literal["adamw", "adamw_bf16"] = "adamw"
    """`adamw` keeps its states in the parameters' precision, which `fsdp.torch_dtype` sets. `adamw_bf16` keeps them in
    bf16, and adds up by Kahan's summation what is too small for bf16 parameters. It does not change
    `fsdp.torch_dtype`: for bf16 weights also set `fsdp.torch_dtype=bf16`."""
    lr_warmup_ratio: float = 0.0
    """Share of the training steps spent on warm-up."""
    lr_warmup_steps: int | None = None
    """Steps spent on warm-up; overrides the ratio."""
    min_lr_ratio: float | None = None
    """Floor of the cosine schedule as a share of `lr`; null is 0."""
    lr_scheduler_type: Literal["constant", "cosine"] = "constant"
    """Shape of the schedule after warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "lr", "weight_decay", "lr_warmup_steps")
        self.require_between(0, 1, "lr_warmup_ratio", "min_lr_ratio")
        self.require(all(0 <= beta < 1 for beta in self.betas), "betas", "has a value outside [0, 1)")


@dataclass(frozen=True)
class FSDPConfig(ConfigSection):
    """How the model's parameters are sharded over the workers and in which precision they compute."""

    enable_full_shard: bool = True
    """Free gathered parameters after the forward pass; false keeps them for the backward pass."""
    enable_cpu_offload: bool = False
    """Keep the shards in host memory, fetch each layer when it computes, and run the optimizer on the CPU; `offload.*`
    then has nothing to move."""
    enable_rank0_init: bool = True
    """Read the weights on rank 0 and send them to the others; false lets every rank read them."""
    use_orig_params: bool = False
    """Accepted for existing configurations, no effect: FSDP2 always keeps the original parameters."""
    torch_dtype: Dtype | None = None
    """Precision of the stored parameters, in which the gradients of micro-batches add up; null is fp32 for a trained
    model, bf16 for the reference, and `mp_param_dtype` for the frozen weights under adapters, which themselves are
    always fp32."""
    fsdp_size: int = -1
    """Workers in one sharding group, a divisor of their number: groups are replicas of each other. -1, or as many as
    there are or more, shards over all of them."""
    mp_param_dtype: Dtype = "bf16"
    """Precision of the parameters in forward and backward."""
    mp_reduce_dtype: Dtype = "fp32"
    """Precision of the gradient reduction."""
    mp_buffer_dtype: Dtype = "fp32"
    """Accepted for existing configurations, no effect: FSDP2 leaves buffers in the precision they were stored in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.fsdp_size == -1 or self.fsdp_size > 0, "fsdp_size", "is neither -1 nor a number of workers")


@dataclass(frozen=True)
class OffloadConfig(ConfigSection):
    """What moves to host memory while it is not in use."""

    offload_params: bool = False
    """Move the parameters out between phases."""
    offload_optimizer: bool = False
    """Move the optimizer's states out between updates; the reference has none."""


@dataclass(frozen=True)
class TrainedModelConfig(ConfigSection):
    """Settings of every trained model: batches, averaging, sharding. Batch sizes count prompts unless noted."""

    strategy: str = "fsdp"
    """Accepted for existing configurations, no effect: sharding is always FSDP2."""
    global_batch_size: int = 256
    """Prompts per optimizer step; each stands for `worker.rollout.n` sequences."""
    micro_batch_size_per_device_for_update: int = 4
    """Sequences a worker takes through forward and backward at once."""
    micro_batch_size_per_device_for_experience: int = 16
    """Sequences a worker takes through a forward pass at once; the reference follows the actor."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    loss_avg_mode: Literal["token", "seq"] = "token"
    """Mean over all tokens of the mini-batch, or over its sequences' own means."""
    ppo_epochs: int = 1
    """Passes over each rollout batch."""
    share_prompts: bool = True
    """Compute the prompt of a group once for all its responses. Takes rows without padding (`padding_free`) that no
    workers share (`ulysses_size=1`), and has no effect on others."""
    padding_free: bool = True
    """Pack sequences without their padding."""
    dynamic_batching: bool = True
    """Fill micro-batches by tokens instead of by sequences."""
    ulysses_size: int = 1
    """Workers that share one sequence."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "global_batch_size", "ppo_epochs", "ulysses_size")
        self.require_at_least(1, "micro_batch_size_per_device_for_update")
        self.require_at_least(1, "micro_batch_size_per_device_for_experience")
        self.require_above_0("max_grad_norm")
        self.refuse_contradictions()

    @property
    def shares_prompts(self) -> bool:
        """Whether the configuration computes shared prompts once; the model must also support packing."""
        return self.share_prompts and self.padding_free and self.ulysses_size == 1


@dataclass(frozen=True)
class ActorConfig(TrainedModelConfig):
    """The policy and its loss."""

    clip_ratio_low: float = 0.2
    """The ratio is clipped below 1 - this."""
    clip_ratio_high: float = 0.3
    """The ratio is clipped above 1 + this."""
    clip_ratio_dual: float = 3.0
    """Bound, in units of -advantage, on the loss of tokens with a negative advantage."""
    loss_type: str = "default"
    """Policy loss, by its name in `verl/algorithms/policy_loss.py`: `default`, `gspo`, `gspo_token`, `cispo` or
    `sapo`. Or a function of your own, `path.py:function`."""
    use_torch_compile: bool = True
    """Accepted for existing configurations, no effect: log-probabilities are computed from the hidden states piece by
    piece, and nearly all of that time goes into products with the output head."""
    tau_positive: float = 1.0
    """SAPO's temperature for tokens with a positive advantage."""
    tau_negative: float = 1.05
    """SAPO's temperature for tokens with a negative advantage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle_function("loss_type")
        self.require_between(0, 1, "clip_ratio_low")
        self.require_at_least(0, "clip_ratio_high")
        self.require(self.clip_ratio_dual > 1, "clip_ratio_dual", "is not above 1, where dual clipping begins")
        self.require_above_0("tau_positive", "tau_negative")


@dataclass(frozen=True)
class RefConfig(ConfigSection):
    """The frozen reference. Its model and batch sizes are the actor's.

    With `worker.actor.model.lora.rank` above 0 it is the actor without its adapters, and no key here has an effect.
    """

    strategy: str = "fsdp"
    """Accepted for existing configurations, no effect: sharding is always FSDP2."""
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
