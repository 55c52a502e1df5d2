# SPDX-License-Identifier: Apache-2.0
"""Calls all workers of one class through one object."""

from collections.abc import Callable, Mapping
from typing import Any

from verl.single_controller.dispatch import Dispatch
from verl.single_controller.worker import Worker
from verl.single_controller.worker_processes import WorkerProcesses


class WorkerGroup:
    """All workers of one class, one in each process, called through one object.

    Every method of `worker_class` that is marked with `@register` becomes a method of the group: its arguments are
    split over the ranks, and its results are gathered in rank order. The first exception of any rank ends all
    processes (others may wait in a collective for the failed rank) and reaches the caller with the worker's traceback.

    Args:
        processes: the processes that host the workers, possibly together with other groups. The caller ends them.
        worker_class: a subclass of `Worker`, or its path `module:Class`, so that this process need not import it.
        shares: by name, the number of neighbouring ranks that get the same part of a call; 1 for missing names.
        **worker_kwargs: passed on to the class beside `rank, world_size, local_rank, device`.

    Its methods raise the worker's exception. If a worker's process or node is lost, they raise a RuntimeError that
    names ranks and node.
    """

    def __init__(
        self,
        processes: WorkerProcesses,
        worker_class: type[Worker] | str,
        shares: Mapping[str, int] | None = None,
        **worker_kwargs: Any,
    ) -> None:
        self.processes = processes
        self.world_size = processes.world_size
        self._name, methods = processes.build(worker_class, worker_kwargs)
        for method, (dispatch, shared_by) in methods.items():
            setattr(self, method, self._drive(method, dispatch, (shares or {}).get(shared_by, 1)))

    def _drive(self, method: str, dispatch: Dispatch, ranks_per_part: int) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            parts = dispatch.split(self.world_size // ranks_per_part, args, kwargs)
            by_rank = [part for part in parts for _ in range(ranks_per_part)]
            return dispatch.gather(self.processes.call(self._name, method, by_rank)[::ranks_per_part])

        return call

    @property
    def alive(self) -> bool:
        """False once the processes were ended, by the caller or by a failure."""
        return self.processes.alive

    def release(self) -> None:
        """Frees the workers. Their processes keep running."""
        self.processes.drop(self._name)
