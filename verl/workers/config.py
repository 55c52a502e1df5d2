# SPDX-License-Identifier: Apache-2.0
"""Configuration of the worker processes."""

from dataclasses import dataclass, field

from verl.config import ConfigSection
from verl.workers.actor.config import ActorConfig, RefConfig
from verl.workers.critic.config import CriticConfig
from verl.workers.reward.config import RewardConfig
from verl.workers.rollout.config import RolloutConfig


@dataclass(frozen=True)
class WorkerConfig(ConfigSection):
    """One section per role of a worker."""

    hybrid_engine: bool = True
    """Training and generation share the same devices."""
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
