# SPDX-License-Identifier: Apache-2.0
"""Starts one worker actor per device, over any number of nodes, and drives them as one object."""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.single_controller.dispatch import Dispatch
from verl.single_controller.lost_processes import PROCESS_LOST, Node, run_ended_by
from verl.single_controller.worker import Worker

logger = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_SECONDS = 300

SETTLE_SECONDS = 5
"""A rank whose peer died fails in their collective about two seconds before Ray says who died."""


def detect_device() -> str:
    """ "cuda" when the Ray cluster has any GPU, else "cpu"."""
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


class WorkerGroup:
    """All workers of one class, driven as one object.

    Every method of `worker_class` that is marked with `@register` becomes a method of the group: its arguments are
    split over the ranks, its answers gathered in rank order. The first exception of any rank kills the group (the
    others may be waiting in a collective for the rank that failed) and reaches the caller with the worker's own
    traceback.

    Args:
        worker_class: a subclass of `Worker`.
        num_nodes, workers_per_node: their product is the number of workers; rank = node * workers_per_node + local.
        device: "cuda" gives each worker one GPU, "cpu" none.
        shares: how many neighbouring ranks share the parts of the methods that name it; 1 for names that are missing.
        **worker_kwargs: passed on to the class beside `rank, world_size, local_rank, device`.

    Raises:
        ValueError: the Ray cluster has fewer GPUs or CPUs than asked for.

    Its methods raise what a worker raised, or, where a worker's process or its node is gone, a RuntimeError that names
    ranks and node.
    """

    def __init__(
        self,
        worker_class: type[Worker],
        num_nodes: int,
        workers_per_node: int,
        device: str,
        shares: Mapping[str, int] | None = None,
        **worker_kwargs: Any,
    ) -> None:
        self.world_size = num_nodes * workers_per_node
        _check_resources(num_nodes, workers_per_node, device)
        self._placement_groups = _reserve_nodes(num_nodes, workers_per_node, device)
        self._node_of_rank = [_node_of(group) for group in self._placement_groups for _ in range(workers_per_node)]
        self._workers = self._start(worker_class, workers_per_node, device, worker_kwargs)
        for name, method in _driven_methods(worker_class).items():
            setattr(self, name, self._drive(name, method.dispatch, (shares or {}).get(method.shared_by, 1)))
        self._join_process_group()

    def _start(
        self, worker_class: type[Worker], workers_per_node: int, device: str, worker_kwargs: dict
    ) -> list[ray.actor.ActorHandle]:
        # More than one thread per process makes CPU workers fight over the cores, many times slower.
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        actor_class = ray.remote(num_cpus=1, num_gpus=1 if device == "cuda" else 0)(worker_class)
        return [
            actor_class.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=local_rank),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}} if device == "cpu" else None,
            ).remote(
                rank=node * workers_per_node + local_rank,
                world_size=self.world_size,
                local_rank=local_rank,
                device=device,
                **worker_kwargs,
            )
            for node, group in enumerate(self._placement_groups)
            for local_rank in range(workers_per_node)
        ]

    def _join_process_group(self) -> None:
        address, port = self._gather([self._workers[0].free_address.remote()])[0]
        self._gather([worker.join_process_group.remote(address, port) for worker in self._workers])

    def _drive(self, name: str, dispatch: Dispatch, ranks_per_part: int) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.alive:
                raise RuntimeError(f"{name} was called on workers that were shut down, after a failure or at the end")
            parts = dispatch.split(self.world_size // ranks_per_part, args, kwargs)
            by_rank = [part for part in parts for _ in range(ranks_per_part)]
            answers = [
                getattr(worker, name).remote(*worker_args, **worker_kwargs)
                for worker, (worker_args, worker_kwargs) in zip(self._workers, by_rank, strict=True)
            ]
            return dispatch.gather(self._gather(answers)[::ranks_per_part])

        return call

    @property
    def alive(self) -> bool:
        """False once the group was shut down, by its owner or by a failure."""
        return bool(self._workers)

    def _gather(self, references: list[ray.ObjectRef]) -> list[Any]:
        """The answers in the order of `references`, one a rank; raises at the first failure, whichever rank it is."""
        answers: dict[ray.ObjectRef, Any] = {}
        pending = references
        try:
            while pending:
                # ray.get on the whole list could wait for a rank that waits for the failed one.
                (ready,), pending = ray.wait(pending, num_returns=1)
                answers[ready] = ray.get(ready)
            return [answers[reference] for reference in references]
        except Exception:
            lost = _lost_ranks(references)
            self.shutdown()
            if not lost:
                raise
            places = {f"rank {rank}": node for rank, node in enumerate(self._node_of_rank)}
            raise run_ended_by(lost, places) from next(iter(lost.values()))

    def shutdown(self) -> None:
        """Kills every worker and gives its device back. Safe to call twice."""
        for worker in self._workers:
            ray.kill(worker)
        for group in self._placement_groups:
            remove_placement_group(group)
        self._workers, self._placement_groups = [], []


def _driven_methods(worker_class: type[Worker]) -> dict[str, Callable]:
    members = {name: getattr(worker_class, name) for name in dir(worker_class)}
    return {name: member for name, member in members.items() if hasattr(member, "dispatch")}


def _check_resources(num_nodes: int, workers_per_node: int, device: str) -> None:
    resource = "GPU" if device == "cuda" else "CPU"
    wanted = num_nodes * workers_per_node
    present = int(ray.cluster_resources().get(resource, 0))
    if wanted > present:
        raise ValueError(
            f"trainer.nnodes={num_nodes} x trainer.n_gpus_per_node={workers_per_node} asks for {wanted} {resource}s, "
            f"but Ray sees {present}; lower them or add nodes to the cluster"
        )


def _reserve_nodes(num_nodes: int, workers_per_node: int, device: str) -> list[PlacementGroup]:
    """One placement group per node, each bundle one device, ordered by the nodes' addresses."""
    bundle = {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": 1}
    groups = [placement_group([bundle] * workers_per_node, strategy="STRICT_PACK") for _ in range(num_nodes)]
    unplaced = [group for group in groups if not group.wait(PLACEMENT_TIMEOUT_SECONDS)]
    if unplaced:
        for group in groups:
            remove_placement_group(group)
        raise ValueError(
            f"no node has {workers_per_node} free x {bundle} for {len(unplaced)} of {num_nodes} nodes "
            f"(trainer.n_gpus_per_node={workers_per_node}, trainer.nnodes={num_nodes}) after "
            f"{PLACEMENT_TIMEOUT_SECONDS} s; `ray status` shows what holds them"
        )
    return sorted(groups, key=_node_of)


def _node_of(group: PlacementGroup) -> Node:
    node_id = ray.util.placement_group_table(group)["bundles_to_node_id"][0]
    address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
    return Node(address, node_id)


def _lost_ranks(references: list[ray.ObjectRef]) -> dict[str, Exception]:
    """The ranks whose processes are gone, after a failure that may be theirs or may follow from it."""
    settled, _ = ray.wait(references, num_returns=len(references), timeout=SETTLE_SECONDS)
    errors = {f"rank {rank}": _error_of(answer) for rank, answer in enumerate(references) if answer in settled}
    return {
        name: error
        for name, error in errors.items()
        # What a worker's constructor raised is its own Python error.
        if isinstance(error, PROCESS_LOST) and not getattr(error, "actor_init_failed", False)
    }


def _error_of(reference: ray.ObjectRef) -> Exception | None:
    try:
        ray.get(reference)
    except Exception as error:  # noqa: BLE001  whatever a worker raises
        return error
    return None
