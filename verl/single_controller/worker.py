# SPDX-License-Identifier: Apache-2.0
"""One process per device: its place among the others, and the process group that joins them."""

import datetime
import os
import socket

import ray
import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)
"""Longer than any phase in which ranks wait for each other (a slow rank may generate for most of an hour)."""


class Worker:
    """Base of every worker: a Ray actor that owns one device and knows its rank.

    Args:
        rank: place among all workers, 0 to `world_size - 1`.
        world_size: number of workers over all nodes.
        local_rank: place among the workers of this node.
        device: "cuda" or "cpu".
    """

    def __init__(self, rank: int, world_size: int, local_rank: int, device: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.device = torch.device(device)

    def free_address(self) -> tuple[str, int]:
        """This node's address and a port that is free on it, for the others to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join_process_group(self, address: str, port: int) -> None:
        """Joins the default process group: gloo for CPU tensors, and NCCL beside it on CUDA."""
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
        )
        if self.device.type == "cuda":
            # Ray shows each actor only its own GPU, so the device index is 0 whatever the local rank; libraries take
            # LOCAL_RANK for that index.
            os.environ["LOCAL_RANK"] = "0"
            torch.cuda.set_device(0)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
