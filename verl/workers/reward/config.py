# SPDX-License-Identifier: Apache-2.0
"""Configuration of the reward, a function in a user's file."""

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.config import ConfigSection


@dataclass(frozen=True)
class RewardConfig(ConfigSection):
    """The reward function and its arguments."""

    reward_function: str | None = None
    """`path.py:function`; without a function, `main`. The path becomes absolute."""
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the function."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the decoded response."""
    num_cpus: int = 1
    """CPU cores reserved for the function."""
    timeout_s: float | None = None
    """Seconds that one call of the function may take; null sets no limit. A call that takes longer counts as failed
    and is made once more; a second failure ends the run, and so does a call that cannot be interrupted. A function of
    one sample (REWARD_TYPE = "sequential") is called for each, the others once for the batch."""
    max_concurrency: int = 32
    """How many calls of an `async def` function of one sample are awaited together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_cpus", "max_concurrency")
        self.require_above_0("timeout_s")
        self.settle_function("reward_function", default="main")
        constants = {}
        if self.reward_function is not None:
            constants = _literal_constants(self.reward_function.rpartition(":")[0])
        # Read once: the file may change while the run uses the loaded version.
        object.__setattr__(self, "_constants", constants)
        self._check_streams()

    def _check_streams(self) -> None:
        streams = self._constants.get("REWARD_STREAMS")
        if streams is None:
            return
        names = (streams,) if isinstance(streams, str) else streams
        are_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        written = "names a file whose REWARD_STREAMS is not a list of names, written out at the top level"
        self.require(streams is not COMPUTED and are_names, "reward_function", written)
        whole = 'names a file with REWARD_STREAMS, which takes REWARD_TYPE = "proto"'
        self.require(self.takes_batch, "reward_function", whole)

    @property
    def takes_batch(self) -> bool:
        """Whether the function takes the whole batch: its file has a literal REWARD_TYPE = "proto"."""
        return self._constants.get("REWARD_TYPE") == "proto"

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams of the log-prob pass that such a function reads: the list REWARD_STREAMS in its file."""
        streams = self._constants.get("REWARD_STREAMS") or ()
        return (streams,) if isinstance(streams, str) else tuple(streams)


COMPUTED = object()
"""Stands for a constant that is not a literal."""


def _literal_constants(path: str) -> dict[str, Any]:
    """The constants of a Python file by name: literals that it assigns at its top level.

    The file is not run. If it cannot be parsed, there are none; the reward process reports the error later.
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
                except ValueError:  # or no value at all
                    constants[target.id] = COMPUTED
    return constants
