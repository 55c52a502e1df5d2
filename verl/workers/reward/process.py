# SPDX-License-Identifier: Apache-2.0
"""The reward function in a process of its own, which stands where the run was started: its variables, its folder.

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
from ray import cloudpickle

from verl.utils.process_tree import memory_of
from verl.utils.termination import leave_termination_to_the_driver
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.results import Scored
from verl.workers.reward.supervision import Limits, Supervision
from verl.workers.reward.user_function import TextDecoder, load_reward_function

OF_THE_PROCESS = {"CUDA_VISIBLE_DEVICES", "PWD", "OLDPWD", "SHLVL", "_"}
"""Variables that belong to a process and do not follow a run; nor do Ray's own, which begin with RAY_."""


@dataclass(frozen=True)
class Whereabouts:
    """Where to find the reward process and its last words, on its node."""

    pid: int
    last_words: str
    """The file in which the supervisor leaves the reason, where it ends the process."""


class RewardProcess:
    """What the Ray actor is: under supervision from the beginning, and nothing else until `load`.

    Args:
        config: of the reward.
        log: the file for what it prints.
        limits: what it may have.
    """

    def __init__(self, config: RewardConfig, log: str, limits: Limits) -> None:
        self._supervision = Supervision(f"the reward function {config.reward_function}", log, config.timeout_s, limits)
        self._has_scored = False

    def whereabouts(self) -> Whereabouts:
        """As they are from its beginning on."""
        return Whereabouts(os.getpid(), self._supervision.last_words)

    def load(
        self, config: RewardConfig, decoder: TextDecoder, prefix: str, variables: Mapping[str, str], folder: str
    ) -> None:
        """Takes the driver's place and runs the user's file.

        A process of a cluster that the run only joins has the variables and the folder of whoever started the
        cluster: a function that reads a judge's address or a file beside it would do something else there.

        Args:
            config, decoder, prefix: as in `load_reward_function`.
            variables: as `variables_of_run` gives them.
            folder: the driver's working folder.

        Raises:
            ValueError: there is no such folder on this machine; or as `load_reward_function` does.
        """
        leave_termination_to_the_driver()
        os.environ.update(variables)
        try:
            os.chdir(folder)
        except OSError as error:
            raise ValueError(
                f"the reward function's process, on {os.uname().nodename}, cannot work in the run's folder {folder}: "
                f"{error.strerror}; start the run in a folder that all machines see"
            ) from error
        if folder not in sys.path:
            sys.path.append(folder)
        self._function = load_reward_function(config, decoder, prefix, self._supervision.call)
        # The file's classes and functions travel whole: Ray's other processes cannot import it.
        cloudpickle.register_pickle_by_value(self._function.module)
        self._supervision.settled(_memory())

    def score(self, given: Any) -> tuple[Scored, int]:
        """As `RewardFunction.score`; and the bytes that this process and its descendants hold then."""
        scored = self._function.score(given)
        memory = _memory()
        if not self._has_scored:
            self._has_scored = True
            self._supervision.settled(memory)
        return scored, memory


def _memory() -> int:
    process = psutil.Process()
    return memory_of([process, *process.children(recursive=True)])


def variables_of_run() -> dict[str, str]:
    """This process's environment, without what belongs to a process alone."""
    return {
        name: value for name, value in os.environ.items() if name not in OF_THE_PROCESS and not name.startswith("RAY_")
    }
