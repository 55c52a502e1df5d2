# SPDX-License-Identifier: Apache-2.0
"""Attention of one sample's response tokens on each of its image tokens, from rotated queries and keys.

Meant for a few samples: it stores a row of scores per query, while `attention_mass` stores none.

Shapes: H heads, Hkv key heads, G groups of neighbouring heads, D head dimension, T queries, K keys, V image tokens.
"""

from __future__ import annotations

import torch

from verl.models.kernels.attention_mass import KeyPlan, SamplePlan

SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Largest number of float32 scores held at a time, by device type."""


@torch.no_grad()
def attention_map(
    query: torch.Tensor,
    key: torch.Tensor,
    plan: KeyPlan,
    sample: SamplePlan,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    head_groups: int = 1,
) -> torch.Tensor:
    """Attention (G, T, V + 2) float32, mean over a group's heads: to each image token, to all text, to the prompt.

    Image tokens are in prompt order. The last column is the whole prompt without the sink. Not normalised.

    Args:
        query, key, plan, scaling, softcap, sinks: as in `attention_mass.chunked`.
        sample: a sample of the plan.
        head_groups: G, divides H.
    """
    plan = plan.to(query.device)
    sample_query = query[sample.batch_row].index_select(1, plan.query_positions[sample.queries]).float() * scaling
    sample_key = key[sample.batch_row].index_select(1, plan.key_positions[sample.keys]).float()  # (Hkv, K, D)
    heads, num_queries = sample_query.shape[:2]
    num_keys = sample_key.shape[1]
    sample_key = sample_key.mT.repeat_interleave(heads // sample_key.shape[0], dim=0)  # (H, D, K)
    at_once = max(1, SCORES_AT_ONCE.get(query.device.type, SCORES_AT_ONCE["cuda"]) // (heads * num_keys))
    places = torch.arange(num_keys, device=query.device)
    parts = []
    for first in range(0, num_queries, at_once):
        scores = sample_query[:, first : first + at_once] @ sample_key  # (H, t, K)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        numbers = torch.arange(first, first + scores.shape[1], device=query.device)
        scores.masked_fill_(places >= sample.end_of_sink + numbers[:, None], -torch.inf)
        if sinks is not None:
            extra = sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, extra], dim=-1)
        attention = scores.softmax(dim=-1).unflatten(0, (head_groups, -1)).mean(dim=1)  # (G, t, K)
        vision = attention[..., sample.end_of_text : sample.end_of_vision]
        text = attention[..., : sample.end_of_text].sum(dim=-1, keepdim=True)
        prompt = attention[..., : sample.end_of_prompt].sum(dim=-1, keepdim=True)
        parts.append(torch.cat([vision, text, prompt], dim=-1))
    return torch.cat(parts, dim=1)
