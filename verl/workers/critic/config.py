# SPDX-License-Identifier: Apache-2.0
"""Configuration of the value model that generalised advantage estimation needs."""

from dataclasses import dataclass, field
from typing import Literal

from verl.config import ConfigSection
from verl.workers.actor.config import FSDPConfig, ModelConfig, OffloadConfig, OptimConfig


@dataclass(frozen=True)
class CriticConfig(ConfigSection):
    """The critic: its batches, its loss, its model. Batch sizes count prompts where not said otherwise."""

    strategy: str = "fsdp"
    """Accepted for existing configurations, no effect: sharding is always FSDP2."""
    global_batch_size: int = 256
    """Prompts per optimizer step; each stands for `worker.rollout.n` sequences."""
    micro_batch_size_per_device_for_update: int = 4
    """Sequences a worker takes through forward and backward at once."""
    micro_batch_size_per_device_for_experience: int = 16
    """Sequences a worker takes through a value pass at once."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    cliprange_value: float = 0.5
    """New values are clipped to this distance from the old ones."""
    loss_avg_mode: Literal["token", "seq"] = "token"
    """Mean over all tokens of the mini-batch, or over its sequences' own means."""
    ppo_epochs: int = 1
    """Passes over each rollout batch."""
    padding_free: bool = False
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
        for key in ("max_grad_norm", "cliprange_value"):
            self.require(getattr(self, key) > 0, key, "is not above 0")
