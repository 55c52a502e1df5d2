# SPDX-License-Identifier: Apache-2.0
"""Configuration of the reward: a function of the user's, in a file of the user's."""

from dataclasses import dataclass, field
from typing import Any

from verl.config import ConfigSection


@dataclass(frozen=True)
class RewardConfig(ConfigSection):
    """Where the reward function is and what it is called with."""

    reward_function: str | None = None
    """`path.py:function`; without a function, `main`. The path becomes absolute."""
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the function."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the decoded response."""
    num_cpus: int = 1
    """CPU cores reserved for the function."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_cpus")
        self.settle_function("reward_function", default="main")
