# SPDX-License-Identifier: Apache-2.0
"""Runs the reward function in a separate process, with the environment and working folder of the driver.

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
from verl.utils.termination import ignore_sigterm
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.results import Scored
from verl.workers.reward.supervision import Limits, Supervision
from verl.workers.reward.user_function import TextDecoder, load_reward_function

OF_THE_PROCESS = {"CUDA_VISIBLE_DEVICES", "PWD", "OLDPWD", "SHLVL", "_"}
"""Environment variables of a single process, which are not passed on. Ray's own, RAY_*, are not either."""


@dataclass(frozen=True)
class ProcessLocation:
    """Process id of the reward process, and the file with the reason for its end."""

    pid: int
    reason_file: str
    """The file in which the supervisor writes the reason if it ends the process."""


class RewardProcess:
    """The class of the Ray actor. It is supervised from the start and idle until `load`.

    Args:
        config: the section `worker.reward`.
        log: the file for its output.
        limits: limits of time and memory.
    """

    def __init__(self, config: RewardConfig, log: str, limits: Limits) -> None:
        self._supervision = Supervision(f"the reward function {config.reward_function}", log, config.timeout_s, limits)
        self._has_scored = False

    def location(self) -> ProcessLocation:
        """The process id and the file, which do not change."""
        return ProcessLocation(os.getpid(), self._supervision.reason_file)

    def load(
        self, config: RewardConfig, decoder: TextDecoder, prefix: str, variables: Mapping[str, str], folder: str
    ) -> None:
        """Takes over the driver's environment and working folder, and loads the user's file.

        In a joined Ray cluster, processes have the environment and folder of the user who started the cluster. There
        a function would not find a judge's address in the environment, or a file beside it.

        Args:
            config, decoder, prefix: as in `load_reward_function`.
            variables: from `variables_of_run`.
            folder: the driver's working folder.

        Raises:
            ValueError: the folder does not exist on this machine; or as in `load_reward_function`.
        """
        ignore_sigterm()
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
        # The file's classes and functions are pickled by value: Ray's other processes cannot import the file.
        cloudpickle.register_pickle_by_value(self._function.module)
        self._supervision.settled(_memory())

    def score(self, inputs: Any) -> tuple[Scored, int]:
        """The result of `RewardFunction.score`, and the memory of this process and its descendants in bytes."""
        scored = self._function.score(inputs)
        memory = _memory()
        if not self._has_scored:
            self._has_scored = True
            self._supervision.settled(memory)
        return scored, memory


def _memory() -> int:
    process = psutil.Process()
    return memory_of([process, *process.children(recursive=True)])


def variables_of_run() -> dict[str, str]:
    """This process's environment, without variables of a single process."""
    return {
        name: value for name, value in os.environ.items() if name not in OF_THE_PROCESS and not name.startswith("RAY_")
    }
