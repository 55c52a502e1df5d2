# SPDX-License-Identifier: Apache-2.0
"""Reward functions of whole batches that the tests train with."""

import torch

from verl.protocol import DataProto

REWARD_TYPE = "proto"


def compute_reward(batch: DataProto) -> tuple[torch.Tensor, dict]:
    """Vowels, as tests/rewards.py counts them; every token weighs as much as the response before it is long."""
    counts = [sum(text.count(vowel) for vowel in "aeiou") for text in batch.non_tensor_batch["response"]]
    weights = batch.batch["response_mask"].cumsum(dim=-1).float() / 4
    return torch.tensor(counts).float(), {"overall": [float(count) for count in counts], "token_weights": weights}


def needs_all(batch: DataProto) -> dict:
    """Reads every stream that a batch has."""
    batch.batch["input_ids"] + batch.batch["attention_mask"]
    grids = batch.non_tensor_batch["image_grid_thw"]
    media = batch.non_tensor_batch["multi_modal_data"]
    assert all((grid is None) == (not handles) for grid, handles in zip(grids, media, strict=True))
    return {"overall": batch.batch["response_mask"].sum(dim=-1)}
