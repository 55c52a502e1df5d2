# SPDX-License-Identifier: Apache-2.0
"""A script for one test: a run on a cluster of two nodes on this machine, until one of them leaves.

    python -m tests.two_nodes key=value ...

prints the nodes of the ranks, the node that left, and the error that ended the run.
"""

import json
import sys
import threading

import ray
from ray.cluster_utils import Cluster

from verl.protocol import DataProto
from verl.trainer.config import load_config
from verl.trainer.main import run
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.step_record import StepRecord

if __name__ == "__main__":
    config = load_config(sys.argv[1:])
    seen = {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})  # for the reward function
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        update_actor = RayDAPOTrainer._update_actor

        def update(trainer: RayDAPOTrainer, batch: DataProto, record: StepRecord) -> None:
            seen["nodes"] = [node.node_id for node in trainer.processes.node_of_rank]
            if record.step == trainer.training_steps:
                seen["left"] = seen["nodes"][2]
                (victim,) = (node for node in nodes if node.node_id == seen["left"])
                # Kills all of the node's processes at once, while the ranks are at work.
                threading.Thread(target=cluster.remove_node, args=(victim, False)).start()
            update_actor(trainer, batch, record)

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
