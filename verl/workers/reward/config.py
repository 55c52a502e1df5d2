# SPDX-License-Identifier: Apache-2.0
"""Configuration of the reward: a function of the user's, in a file of the user's."""

import ast
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
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
    timeout_s: float | None = None
    """Seconds that one call of the function may take; null sets no limit. A call that takes longer counts as failed,
    is made once more, and then ends the run. A function of one sample (REWARD_TYPE = "sequential") is called for each,
    the others once for the batch."""
    max_concurrency: int = 32
    """How many calls of an `async def` function of one sample are awaited together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_cpus", "max_concurrency")
        self.require_above_0("timeout_s")
        self.settle_function("reward_function", default="main")

    @property
    def takes_batch(self) -> bool:
        """Whether the function takes the batch whole: its file has REWARD_TYPE = "proto", written out."""
        return self._constants.get("REWARD_TYPE") == "proto"

    @property
    def streams(self) -> tuple[str, ...]:
        """What such a function wants of the log-prob pass: REWARD_STREAMS, a list of names, of its file."""
        streams = self._constants.get("REWARD_STREAMS", ()) if self.takes_batch else ()
        return (streams,) if isinstance(streams, str) else tuple(streams)

    @property
    def _constants(self) -> dict[str, Any]:
        if self.reward_function is None:
            return {}
        path = self.reward_function.rpartition(":")[0]
        return _literal_constants(path, os.stat(path).st_mtime_ns)


@lru_cache
def _literal_constants(path: str, changed: int) -> dict[str, Any]:
    """The constants of a Python file by name: what it assigns at its top level, written as literals.

    The file does not run. One that cannot be parsed has none; the reward process says what is wrong with it.

    Args:
        changed: when the file was; one that has changed is read anew.
    """
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):
        return {}
    constants = {}
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(statement, (ast.Assign, ast.AnnAssign)):
                try:
                    constants[target.id] = ast.literal_eval(statement.value)
                except ValueError:  # computed, or no value at all
                    constants.pop(target.id, None)
    return constants
