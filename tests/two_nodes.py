# SPDX-License-Identifier: Apache-2.0
"""A script for one test: a run on a cluster of two nodes on this machine. One node leaves in each attempt.

    python -m tests.two_nodes key=value ...

prints the nodes of the ranks and the node that left, by attempt, and the error that ended the run. After the first
attempt another node comes in the place of the one that left.
"""

import json
import sys
import threading
from collections.abc import Mapping

import ray
from ray.cluster_utils import Cluster

from verl.protocol import DataProto
from verl.trainer import restarts
from verl.trainer.config import load_config
from verl.trainer.main import run
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.step_record import StepRecord

if __name__ == "__main__":
    config = load_config(sys.argv[1:])
    seen = {"nodes": [], "left": []}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})  # for the reward function
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        update_actor = RayDAPOTrainer._update_actor

        def update(trainer: RayDAPOTrainer, batch: DataProto, record: StepRecord) -> None:
            if record.step == trainer.training_steps:
                seen["nodes"].append([node.node_id for node in trainer.processes.node_of_rank])
                seen["left"].append(seen["nodes"][-1][2])
                threading.Thread(target=lose_node, args=(seen["left"][-1],)).start()
            update_actor(trainer, batch, record)

        def lose_node(node_id: str) -> None:
            (victim,) = (node for node in nodes if node.node_id == node_id)
            # Kills all of the node's processes at once, while the ranks are at work.
            cluster.remove_node(victim, False)

        wait_for = restarts._wait_for

        def add_node_and_wait(resources: Mapping[str, int]) -> None:
            nodes.append(cluster.add_node(num_cpus=2))
            wait_for(resources)

        restarts._wait_for = add_node_and_wait

        RayDAPOTrainer._update_actor = update
        ray.init(address=cluster.address, logging_level="ERROR")
        try:
            run(config)
        except RuntimeError as error:
            seen["error"] = str(error)
        sys.stdout.write(json.dumps(seen))
    finally:
        ray.shutdown()
        cluster.shutdown()
