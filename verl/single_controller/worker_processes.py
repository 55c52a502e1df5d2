# SPDX-License-Identifier: Apache-2.0
"""The processes that host workers: one per device, on any number of nodes, joined in one process group.

The processes start before their workers are built, so that they import modules while the trainer still reads its data.
This file loads neither torch nor transformers.
"""

from __future__ import annotations

import datetime
import gc
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.single_controller.lost_processes import PROCESS_LOST, Node, run_ended_by
from verl.single_controller.waiting import Waiting
from verl.utils.lean_imports import import_modules, import_object
from verl.utils.termination import ignore_sigterm

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)
"""Longer than any phase in which ranks wait for each other (a slow rank may generate for most of an hour)."""

PLACEMENT_TIMEOUT_SECONDS = 300

SETTLE_SECONDS = 5
"""When a rank dies, its peers fail in a collective about two seconds before Ray reports the death."""


def threads_of_worker(device: str, node_resources: Mapping[str, float]) -> str:
    """The number of OpenMP threads of a worker: `OMP_NUM_THREADS` if this process has it; otherwise, with a GPU, the
    worker's share of the node's cores; on a CPU one, since more would compete for the cores and be many times slower.

    Args:
        node_resources: `CPU` and `GPU` of the worker's node, as Ray counts them.
    """
    if (chosen := os.environ.get("OMP_NUM_THREADS")) is not None:
        return chosen
    if device != "cuda":
        return "1"
    return str(max(1, int(node_resources["CPU"] // node_resources["GPU"])))


def detect_device() -> str:
    """ "cuda" when the Ray cluster has any GPU, else "cpu"."""
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


class WorkerProcess:
    """A Ray actor with one device that hosts workers.

    Args:
        rank, world_size, local_rank, device: passed on to every worker.
        variables: environment variables, for libraries that read them on import.
    """

    def __init__(self, rank: int, world_size: int, local_rank: int, device: str, variables: Mapping[str, str]) -> None:
        ignore_sigterm()
        os.environ.update(variables)
        self.place = {"rank": rank, "world_size": world_size, "local_rank": local_rank, "device": device}
        self.workers: dict[str, Any] = {}

    def import_modules(self, names: Sequence[str]) -> None:
        """Imports modules that a worker will need."""
        import_modules(names)
        gc.freeze()  # modules live as long as the process; collections need not visit them

    def free_address(self) -> tuple[str, int]:
        """This node's address and a free port, for the ranks' rendezvous."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join_process_group(self, address: str, port: int) -> None:
        """Joins the default process group: gloo for CPU tensors, and on CUDA also NCCL."""
        import torch
        import torch.distributed as dist

        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self.place["rank"]),
            WORLD_SIZE=str(self.place["world_size"]),
            LOCAL_RANK=str(self.place["local_rank"]),
        )
        is_cuda = self.place["device"] == "cuda"
        if is_cuda:
            # Ray shows each actor only its own GPU, so the device index is 0 whatever the local rank; libraries take
            # LOCAL_RANK for that index.
            os.environ["LOCAL_RANK"] = "0"
            torch.cuda.set_device(0)
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)

    def build(
        self, name: str, worker_class: type | str, worker_kwargs: dict[str, Any]
    ) -> dict[str, tuple[Any, str | None]]:
        """Builds a worker under `name`, which the other methods take.

        Returns:
            The (dispatch, shared_by) of each method that is marked with `@register`.
        """
        if isinstance(worker_class, str):
            worker_class = import_object(worker_class)
        self.workers[name] = worker_class(**worker_kwargs, **self.place)
        members = {method: getattr(worker_class, method) for method in dir(worker_class)}
        return {key: (one.dispatch, one.shared_by) for key, one in members.items() if hasattr(one, "dispatch")}

    def call(self, name: str, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Calls a method of the worker and returns its result."""
        return getattr(self.workers[name], method)(*args, **kwargs)

    def drop(self, name: str) -> None:
        """Forgets a worker and frees its memory."""
        self.workers.pop(name, None)
        gc.collect()  # a model has reference cycles
        if self.place["device"] == "cuda":
            import torch

            torch.cuda.empty_cache()


class WorkerProcesses:
    """The processes that host groups of workers. A context manager that ends them.

    The constructor returns once the cluster has reserved devices; the first `build` waits until all have started and
    share a process group. A failure of any method ends all of them.

    Args:
        num_nodes, workers_per_node: their product is the number of processes; rank = node * workers_per_node + local.
        device: "cuda" gives each process one GPU, "cpu" none.
        modules: modules to import right after the start.
        variables: their environment variables.

    Raises:
        ValueError: the Ray cluster has fewer GPUs or CPUs than asked for.
    """

    def __init__(
        self,
        num_nodes: int,
        workers_per_node: int,
        device: str,
        modules: Sequence[str] = (),
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.device = device
        self.world_size = num_nodes * workers_per_node
        _check_resources(num_nodes, workers_per_node, device)
        self._placement_groups = _reserve_nodes(num_nodes, workers_per_node, device)
        self.node_of_rank = [_node_of(group) for group in self._placement_groups for _ in range(workers_per_node)]
        self._actors = self._start(workers_per_node, variables)
        self._imports = [actor.import_modules.remote(modules) for actor in self._actors]
        self._has_joined = False

    def _start(self, workers_per_node: int, variables: Mapping[str, str]) -> list[ray.actor.ActorHandle]:
        # By default Ray gives each process one thread. With a runtime environment for the variables, Ray would start a
        # new process instead of taking an idle one.
        threads = [threads_of_worker(self.device, _record_of(group)["Resources"]) for group in self._placement_groups]
        actor_class = ray.remote(num_cpus=1, num_gpus=int(self.device == "cuda"))(WorkerProcess)
        return [
            actor_class.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=local_rank)
            ).remote(
                rank=node * workers_per_node + local_rank,
                world_size=self.world_size,
                local_rank=local_rank,
                device=self.device,
                variables={"OMP_NUM_THREADS": threads[node], **variables},
            )
            for node, group in enumerate(self._placement_groups)
            for local_rank in range(workers_per_node)
        ]

    def build(
        self, worker_class: type | str, worker_kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, tuple[Any, str | None]]]:
        """Builds a worker in every process.

        Args:
            worker_class: the class, or its path `module:Class`, which then only the processes import.

        Returns:
            The name for `call` and `drop`, and the result of `WorkerProcess.build`.

        Raises:
            RuntimeError: the processes have ended, or a process or its node is lost.
            Exception: the exception of a worker.
        """
        class_name = worker_class.rpartition(":")[2] if isinstance(worker_class, str) else worker_class.__name__
        self._require_alive(class_name)
        if not self._has_joined:
            self._join()
        name = f"{class_name} {uuid.uuid4().hex}"
        methods = self._gather(
            f"{class_name}.__init__",
            [actor.build.remote(name, worker_class, worker_kwargs) for actor in self._actors],
        )
        return name, methods[0]

    def _join(self) -> None:
        self._gather("the imports", self._imports)
        address, port = self._gather("free_address", [self._actors[0].free_address.remote()])[0]
        joins = [actor.join_process_group.remote(address, port) for actor in self._actors]
        self._gather("join_process_group", joins)
        self._has_joined = True

    def call(self, name: str, method: str, parts: Sequence[tuple[tuple, dict]]) -> list[Any]:
        """Calls a method of every worker of that name, each with its own (args, kwargs); returns the results by rank.

        Raises:
            RuntimeError, Exception: as `build` does.
        """
        self._require_alive(method)
        title = f"{name.partition(' ')[0]}.{method}"  # Ray shows it as the process title during the call
        return self._gather(
            title,
            [
                actor.call.options(name=title).remote(name, method, args, kwargs)
                for actor, (args, kwargs) in zip(self._actors, parts, strict=True)
            ],
        )

    def drop(self, name: str) -> None:
        """Frees the workers of that name, without waiting."""
        for actor in self._actors:
            actor.drop.remote(name)

    def _require_alive(self, called: str) -> None:
        if not self.alive:
            raise RuntimeError(f"{called} was called on workers that were shut down, after a failure or at the end")

    @property
    def alive(self) -> bool:
        """False once the processes were ended, by the caller or by a failure."""
        return bool(self._actors)

    def _gather(self, called: str, references: list[ray.ObjectRef]) -> list[Any]:
        """The results in the order of `references`, one per rank; raises at the first failure of any rank.

        A failure ends all processes, since others may wait in a collective for the failed rank.

        Args:
            called: the method, for messages.
        """

        def unanswered(pending: Sequence[ray.ObjectRef]) -> str:
            return f"{called} on {self._places_of([references.index(reference) for reference in pending])}"

        answers: dict[ray.ObjectRef, Any] = {}
        waiting, pending = Waiting(unanswered), references
        try:
            while pending:
                # ray.get on the whole list could wait for a rank that waits for the failed one.
                ready, pending = waiting.first(pending)
                answers[ready] = ray.get(ready)
            return [answers[reference] for reference in references]
        except Exception:
            lost = _lost_ranks(references)
            self.shutdown()
            if not lost:
                raise
            places = {f"rank {rank}": node for rank, node in enumerate(self.node_of_rank)}
            raise run_ended_by(lost, places) from next(iter(lost.values()))

    def _places_of(self, ranks: Sequence[int]) -> str:
        """Ranks by node, such as `ranks 0, 1 of node 10.0.0.1 (Ray node 3fa9c210); rank 9 of node ...`."""
        ranks_by_node: dict[Node, list[str]] = {}
        for rank in ranks:
            ranks_by_node.setdefault(self.node_of_rank[rank], []).append(str(rank))
        return "; ".join(
            f"rank{'s' * (len(names) > 1)} {', '.join(names)} of node {node}" for node, names in ranks_by_node.items()
        )

    def shutdown(self) -> None:
        """Kills every process and frees its device. Safe to call twice."""
        for actor in self._actors:
            ray.kill(actor)
        for group in self._placement_groups:
            remove_placement_group(group)
        self._actors, self._placement_groups = [], []

    def __enter__(self) -> WorkerProcesses:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()


def _check_resources(num_nodes: int, workers_per_node: int, device: str) -> None:
    resource = "GPU" if device == "cuda" else "CPU"
    require_devices(num_nodes, workers_per_node, resource, int(ray.cluster_resources().get(resource, 0)))


def require_devices(num_nodes: int, workers_per_node: int, resource: str, present: int) -> None:
    """Raise unless there are as many GPUs, or CPUs, as workers.

    Raises:
        ValueError: there are fewer.
    """
    wanted = num_nodes * workers_per_node
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
    record = _record_of(group)
    return Node(record["NodeManagerAddress"], record["NodeID"])


def _record_of(group: PlacementGroup) -> dict[str, Any]:
    """Ray's record of the node that has all bundles of the group."""
    node_id = ray.util.placement_group_table(group)["bundles_to_node_id"][0]
    return next(node for node in ray.nodes() if node["NodeID"] == node_id)


def _lost_ranks(references: list[ray.ObjectRef]) -> dict[str, Exception]:
    """The ranks whose processes are lost, after a failure that may be the cause or a consequence."""
    settled, _ = ray.wait(references, num_returns=len(references), timeout=SETTLE_SECONDS)
    errors = {f"rank {rank}": _error_of(answer) for rank, answer in enumerate(references) if answer in settled}
    return {
        name: error
        for name, error in errors.items()
        # A process that could not start, for example for a missing package, has a Python error of its own.
        if isinstance(error, PROCESS_LOST) and not getattr(error, "actor_init_failed", False)
    }


def _error_of(reference: ray.ObjectRef) -> Exception | None:
    try:
        ray.get(reference)
    except Exception as error:  # noqa: BLE001  whatever a worker raises
        return error
    return None
