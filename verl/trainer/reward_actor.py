# SPDX-License-Identifier: Apache-2.0
"""The trainer's handle of the reward function's process: waits for answers, and explains why one will not come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.single_controller.lost_processes import HOW_TO_GO_ON, PROCESS_LOST, Node, node_of, run_ended_by
from verl.single_controller.waiting import Waiting
from verl.workers.reward.calls import longest_seconds
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.process import RewardProcess
from verl.workers.reward.supervision import Limits

LAST_WORDS_SECONDS = 20.0
"""How long a process on the reward function's node may take to start and read the supervisor's reason."""


class RewardActor:
    """A process for the reward function, under a supervisor. It starts with this object.

    Args:
        config: the function, and how many CPUs its process takes.
        log: the file for its output.
        limits: enforced by the supervisor.
    """

    def __init__(self, config: RewardConfig, log: str, limits: Limits) -> None:
        self._config = config
        self._limits = limits
        actor_class = ray.remote(num_cpus=config.num_cpus)(RewardProcess)
        self._actor = actor_class.remote(config, os.path.abspath(log), limits)
        self._node = node_of(self._actor)
        self._location = self._actor.location.remote()

    def load(self, *args: Any) -> ray.ObjectRef:
        """As `RewardProcess.load`, without its config; the reference is for `answer`."""
        return self._actor.load.remote(self._config, *args)

    def score(self, inputs: Any) -> ray.ObjectRef:
        """As `RewardProcess.score`; the reference is for `answer`."""
        return self._actor.score.remote(inputs)

    def kill(self) -> None:
        """Ends the process; its supervisor ends its descendants."""
        ray.kill(self._actor)

    def answer(self, request: ray.ObjectRef, task: str, num_samples: int | None = None) -> Any:
        """The result of a request.

        Args:
            task: the work, in words for messages, such as `loading its file`.
            num_samples: number of samples to be scored; sets how long to wait if calls have a time limit.

        Raises:
            RuntimeError: the process or its node is gone, or the supervisor ended it for its time or memory.
            Exception: the error that the process raised.
        """
        limit_s = self._longest_wait(num_samples)
        waiting = Waiting(lambda _: f"{self._label}, {task} ({self._place()})", limit_s)
        try:
            waiting.first([request])
        except TimeoutError as error:
            limit = f"worker.reward.timeout_s={self._config.timeout_s:g}"
            raise RuntimeError(f"{error}, though {limit} is over for every call. {HOW_TO_GO_ON}") from None
        try:
            return ray.get(request)
        except PROCESS_LOST as error:
            node = ray.get(self._node)
            if words := self._end_reason(node):
                raise RuntimeError(f"{words}. It was {task}. {HOW_TO_GO_ON}") from error
            name = "the reward function's process"
            raise run_ended_by({name: error}, {name: node}) from error

    def _longest_wait(self, num_samples: int | None) -> float | None:
        """Seconds within which the process or its supervisor must answer, unless both are stuck."""
        if num_samples is None or self._config.timeout_s is None:
            return None
        return longest_seconds(self._config.timeout_s, num_samples) + 2 * self._limits.grace_s

    def _end_reason(self, node: Node) -> str:
        """Why the supervisor ended the process; empty if it did not, or if its node is gone."""
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        try:
            path = ray.get(self._location).reason_file
            text = _take_text.options(scheduling_strategy=there).remote(path)
            return ray.get(text, timeout=LAST_WORDS_SECONDS)
        except ray.exceptions.RayError:
            return ""

    @property
    def _label(self) -> str:
        return f"the reward function {self._config.reward_function}"

    def _place(self) -> str:
        """The process id and node, as far as known."""
        known = [self._node, self._location]
        if len(ray.wait(known, num_returns=len(known), timeout=0)[0]) < len(known):
            return "whose process has not started"
        return f"process {ray.get(self._location).pid} of node {ray.get(self._node)}"


@ray.remote(num_cpus=0, max_retries=0)
def _take_text(path: str) -> str:
    """Reads and deletes a text file; empty if there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    os.remove(path)
    return text
