# SPDX-License-Identifier: Apache-2.0
"""Orders a step's rows so that every rank gets the same number of rows and about the same number of tokens."""

import torch

from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.trainer.streams import shares_prompts
from verl.utils.batch_plan import BatchPlan
from verl.utils.response_span import prompt_lengths
from verl.utils.seqlen_balancing import TokenCosts, balanced_order, seqlen_metrics


def balance_across_ranks(batch: DataProto, config: PPOConfig, plan: BatchPlan) -> dict[str, float]:
    """Reorders the rows of `batch`. Groups that share their prompt stay together where they divide over the ranks.

    Mini-batches keep their rows, so the optimizer steps do not depend on the number of ranks.

    Reads: `attention_mask`, and where prompts are shared `response_mask` and `uid`.

    Returns:
        Metrics: tokens per rank before and after.
    """
    lengths = batch.batch["attention_mask"].sum(dim=1).tolist()
    costs = None
    if shares_prompts(config):
        prompts = prompt_lengths(batch.batch["attention_mask"], batch.batch["response_mask"]).tolist()
        costs = TokenCosts.from_groups(lengths, prompts, batch.non_tensor_batch["uid"])
    order = balanced_order(lengths, plan.world_size, plan.num_balance_pieces, costs)
    batch.reorder(torch.tensor(order))
    return seqlen_metrics(lengths, order, plan.world_size)
