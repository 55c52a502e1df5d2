# SPDX-License-Identifier: Apache-2.0
"""Drives all workers of one class as one object."""

from collections.abc import Callable, Mapping
from typing import Any

from verl.single_controller.dispatch import Dispatch
from verl.single_controller.worker import Worker
from verl.single_controller.worker_processes import WorkerProcesses


class WorkerGroup:
    """All workers of one class, one in each process, driven as one object.

    Every method of `worker_class` that is marked with `@register` becomes a method of the group: its arguments are
    split over the ranks, its answers gathered in rank order. The first exception of any rank ends the processes (the
    others may be waiting in a collective for the rank that failed) and reaches the caller with the worker's own
    traceback.

    Args:
        processes: where the workers live, beside those of other groups. They stay their owner's to end.
        worker_class: a subclass of `Worker`, or its place as `module:Class`, which this process then need not import.
        shares: how many neighbouring ranks share the parts of the methods that name it; 1 for names that are missing.
        **worker_kwargs: passed on to the class beside `rank, world_size, local_rank, device`.

    Its methods raise what a worker raised, or, where a worker's process or its node is gone, a RuntimeError that names
    ranks and node.
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
        """False once the processes were ended, by their owner or by a failure."""
        return self.processes.alive

    def release(self) -> None:
        """Frees the workers. Their processes live on."""
        self.processes.drop(self._name)
