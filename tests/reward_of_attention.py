# SPDX-License-Identifier: Apache-2.0
"""A reward function that weighs tokens by attention itself."""

import torch

from verl.protocol import DataProto
from verl.utils.attention_metrics import vgr_from_mass
from verl.utils.attention_token_weights import token_weights_from_vgr

REWARD_TYPE = "proto"
REWARD_STREAMS = ["attention_mass", "attention_keys"]


def compute_reward(batch: DataProto) -> tuple[torch.Tensor, dict]:
    """Vowels; in training each token weighs by 1 / VGR, as the trainer would weigh it."""
    counts = [float(sum(text.count(vowel) for vowel in "aeiou")) for text in batch.non_tensor_batch["response"]]
    if batch.meta_info["split"] == "val":
        return torch.tensor(counts), {}
    vgr = vgr_from_mass(batch.batch["attention_mass"], batch.batch["attention_keys"])
    return torch.tensor(counts), {"token_weights": token_weights_from_vgr(vgr, batch.batch["response_mask"])}
