# SPDX-License-Identifier: Apache-2.0
"""Worker processes that tests share: one that starts and imports anew costs seconds.

Tests that need a process of their own (an engine of vLLM lives as long as its process; a test may kill) start
`WorkerProcesses` themselves.
"""

import os

import ray

from verl.single_controller.worker_processes import WorkerProcesses
from verl.trainer.config import PPOConfig
from verl.trainer.main import run, worker_modules

_SHARED: dict[int, WorkerProcesses] = {}


def shared_processes(count: int) -> WorkerProcesses:
    """As many, in one process group; new ones where a failure has ended those before. Needs the `ray_cluster` fixture.

    Groups live in them side by side, each until it is released.
    """
    if count not in _SHARED or not _SHARED[count].alive:
        _SHARED[count] = new_processes(count)
    return _SHARED[count]


def new_processes(count: int, engine: str = "hf") -> WorkerProcesses:
    """As many of a test's own, which the test has to end."""
    return WorkerProcesses(1, count, "cpu", worker_modules(engine))


def run_shared(config: PPOConfig) -> None:
    """A whole run in shared processes, as many as it asks for."""
    run(config, shared_processes(config.trainer.nnodes * config.trainer.n_gpus_per_node))


def pids_of(processes: WorkerProcesses) -> list[int]:
    """By rank."""
    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in processes._actors])
