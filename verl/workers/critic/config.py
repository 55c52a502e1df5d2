# SPDX-License-Identifier: Apache-2.0
"""Configuration of the value model that generalised advantage estimation needs."""

from dataclasses import dataclass

from verl.workers.actor.config import TrainedModelConfig


@dataclass(frozen=True)
class CriticConfig(TrainedModelConfig):
    """The critic and its loss."""

    cliprange_value: float = 0.5
    """New values are clipped to this distance from the old ones."""
    padding_free: bool = False
    """Pack sequences without their padding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_above_0("cliprange_value")
