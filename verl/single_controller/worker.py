# SPDX-License-Identifier: Apache-2.0
"""The base class of workers, with rank and device."""

import torch


class Worker:
    """Base of every worker: owns one device and knows its rank.

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
