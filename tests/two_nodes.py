# SPDX-License-Identifier: Apache-2.0
"""A script for one test: a cluster of two nodes on this machine, and one worker on each; prints what they say."""

import json
import sys

import ray
import torch
from ray.cluster_utils import Cluster

from tests.test_worker_group import ArithmeticWorker
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level="ERROR")
        group = WorkerGroup(ArithmeticWorker, num_nodes=2, workers_per_node=1, device="cpu", offset=0)
        answer = {
            "places": [place[:3] for place in group.whereabouts()],
            "nodes": group.node(),
            "total": group.total(DataProto.from_dict({"value": torch.arange(6)})),
        }
        group.shutdown()
        sys.stdout.write(json.dumps(answer))
    finally:
        ray.shutdown()
        cluster.shutdown()  # also takes back the note of a running cluster, which other runs would try to join
