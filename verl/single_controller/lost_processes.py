# SPDX-License-Identifier: Apache-2.0
"""Reports which processes of a run are lost, on which node, whether the node is lost too, and how to resume."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayActorError

PROCESS_LOST = (RayActorError, ObjectLostError, OutOfMemoryError)
"""Ray's errors for a result whose process, or whose object store, is gone."""

HOW_TO_GO_ON = (
    "The run's other processes were ended. Started again, by hand with trainer.find_last_checkpoint=true or by "
    "trainer.max_restarts, it goes on from the last checkpoint"
)

NODE_VERDICT_SECONDS = 60
"""Ray declares a node dead after failed health checks: by default 15 s after a crash, 60 s without an answer."""


@dataclass(frozen=True, order=True)
class Node:
    """A machine of the Ray cluster; sorted by address."""

    address: str
    node_id: str

    def __str__(self) -> str:
        return f"{self.address} (Ray node {self.node_id[:8]})"


class ProcessesLost(RuntimeError):
    """Processes or nodes of the run are lost; `news` says which."""

    def __init__(self, news: str) -> None:
        super().__init__(f"{news}. {HOW_TO_GO_ON}")
        self.news = news


def node_of(actor: ray.actor.ActorHandle) -> ray.ObjectRef:
    """A reference to the `Node` of `actor`. It resolves once the actor has started, and outlives the actor."""
    return actor.__ray_call__.remote(
        lambda _: Node(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())
    )


def run_ended_by(errors: Mapping[str, Exception], node_of_process: Mapping[str, Node]) -> ProcessesLost:
    """The error that ends a run. Waits until Ray knows whether the nodes are alive.

    Args:
        errors: Ray's errors for the lost processes, by name.
        node_of_process: the nodes of these processes and their peers; a lost node takes all of its processes along.
    """
    undecided = any(isinstance(error, ActorUnavailableError) for error in errors.values())
    nodes = sorted({node_of_process[name] for name in errors})
    gone = _nodes_gone(nodes, NODE_VERDICT_SECONDS if undecided else 0)
    news = []
    for node in nodes:
        names = [name for name, place in node_of_process.items() if place == node and (node in gone or name in errors)]
        if node in gone:
            news.append(f"node {node} has left the Ray cluster, and {', '.join(names)} with it")
        else:
            news.append(
                f"{', '.join(names)} on node {node} died without a Python error, as a process does that is killed "
                "for its memory or crashes in native code"
            )
    return ProcessesLost("; ".join(news))


def _nodes_gone(nodes: Collection[Node], seconds: float) -> set[Node]:
    """The dead ones among `nodes`, according to Ray; waits up to `seconds` for the first."""
    deadline = time.monotonic() + seconds
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        gone = {node for node in nodes if node.node_id not in alive}
        if gone or time.monotonic() > deadline:
            return gone
        time.sleep(0.5)
