# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_seqlen_balancing.py
"""Balancing moves rows and loses none, keeps mini-batches together and micro-batches within their budget."""

import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from verl.protocol import DataProto
from verl.utils.seqlen_balancing import (
    balanced_order,
    partition_evenly,
    prepare_dynamic_batch,
    restore_dynamic_batch,
    seqlen_metrics,
)


def sums(lengths: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(lengths[row] for row in part) for part in parts]


def batch_of(lengths: list[int]) -> DataProto:
    """Rows with these many real tokens; `row` holds the row's number."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    return DataProto.from_dict({"attention_mask": mask.long(), "row": torch.arange(len(lengths))})


def test_differencing_by_hand():
    """8 7 6 5 4: 8 - 7 leaves 1, 6 - 5 leaves 1; 4 - 1 leaves 3, 3 - 1 leaves 2. So sums of 30 differ by 2: 16, 14."""
    lengths = [4, 8, 6, 5, 7]
    assert sums(lengths, partition_evenly(lengths, 2, equal_count=False)) == [16, 14]


def test_equal_counts_by_hand():
    """Neighbours (9, 8), (4, 1): spreads 1 and 3. 9 goes with 1 and 8 with 4: 12 and 10, two rows each."""
    lengths = [9, 8, 4, 1]
    assert partition_evenly(lengths, 2, equal_count=True) == [[1, 2], [0, 3]]


@pytest.mark.parametrize("equal_count", [True, False])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 8])
def test_a_partition_has_every_row_once_no_empty_part_and_close_sums(num_parts, equal_count):
    for seed in range(20):
        generator = random.Random(seed)
        lengths = [generator.randint(1, 1000) for _ in range(24)]
        parts = partition_evenly(lengths, num_parts, equal_count)
        assert sorted(row for part in parts for row in part) == list(range(24))
        assert all(part == sorted(part) for part in parts)
        counts = [len(part) for part in parts]
        assert min(counts) > 0
        assert not equal_count or counts == [24 // num_parts] * num_parts
        assert max(sums(lengths, parts)) - min(sums(lengths, parts)) <= max(lengths) // 2


def test_rows_that_do_not_divide_are_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="cannot deal 5 rows to 2 parts; the number of rows must be a multiple of"):
        partition_evenly([1] * 5, 2, equal_count=True)
    with pytest.raises(ValueError, match="cannot deal 2 rows to 3 parts; the number of rows must be at least"):
        partition_evenly([1] * 2, 3, equal_count=False)
    with pytest.raises(ValueError, match="6 rows do not divide into 2 mini-batches x 2 ranks; .* a multiple of 4"):
        balanced_order([1] * 6, num_ranks=2, num_mini_batches=2)


def test_one_rank_leaves_the_order_as_it_is():
    assert balanced_order([5, 1, 9, 2, 7, 3], num_ranks=1, num_mini_batches=3) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_mini_batches", [1, 3])
def test_every_optimizer_step_sees_the_same_rows_whatever_the_number_of_ranks(num_ranks, num_mini_batches):
    generator = random.Random(0)
    lengths = [generator.randint(1, 100) for _ in range(24)]
    order = balanced_order(lengths, num_ranks, num_mini_batches)

    rows_per_rank, rows_per_step = 24 // num_ranks, 24 // num_mini_batches
    per_step = rows_per_step // num_ranks
    for step in range(num_mini_batches):
        seen = []
        for rank in range(num_ranks):
            shard = order[rank * rows_per_rank : (rank + 1) * rows_per_rank]
            seen += shard[step * per_step : (step + 1) * per_step]
        assert sorted(seen) == list(range(step * rows_per_step, (step + 1) * rows_per_step))


def test_balanced_order_and_its_metrics_by_hand():
    """Two mini-batches of two rows for two ranks, lengths 10 1 | 8 3: before, the ranks have 11 and 11 by luck.

    Mini-batch 0 gives 10 to rank 0 and 1 to rank 1; rank 1, now lighter, gets the 8 of mini-batch 1. So 13 and 9.
    """
    lengths = [10, 1, 8, 3]
    order = balanced_order(lengths, num_ranks=2, num_mini_batches=2)
    assert order == [0, 3, 1, 2]
    assert seqlen_metrics(lengths, order, num_ranks=2) == {
        "global_seqlen/min": 11,
        "global_seqlen/max": 11,
        "global_seqlen/minmax_diff": 0,
        "global_seqlen/balanced_min": 9,
        "global_seqlen/balanced_max": 13,
        "global_seqlen/mean": 11.0,
    }


def test_balancing_brings_the_ranks_closer():
    """Sorted lengths 1..32: the contiguous halves sum to 136 and 392, balanced ones to 264 each."""
    lengths = list(range(1, 33))
    metrics = seqlen_metrics(lengths, balanced_order(lengths, 2, 1), 2)
    assert (metrics["global_seqlen/min"], metrics["global_seqlen/max"]) == (136, 392)
    assert metrics["global_seqlen/minmax_diff"] == 256
    assert (metrics["global_seqlen/balanced_min"], metrics["global_seqlen/balanced_max"]) == (264, 264)


def test_dynamic_batches_keep_their_budget_and_come_back_in_order():
    for seed in range(30):
        generator = random.Random(seed)
        lengths = [generator.randint(1, 20) for _ in range(generator.randint(1, 30))]
        micro_batches, index_lists = prepare_dynamic_batch(batch_of(lengths), max_token_len=20)
        tokens = sums(lengths, index_lists)
        assert max(tokens) <= 20
        assert tokens == sorted(tokens, reverse=True)
        assert [batch.batch["row"].tolist() for batch in micro_batches] == index_lists
        together = torch.cat([batch.batch["row"] for batch in micro_batches])
        assert restore_dynamic_batch(together, index_lists).tolist() == list(range(len(lengths)))


def padded_tokens(rows: DataProto) -> int:
    """Of a micro-batch whose rows stand side by side, without the columns that are padding in all of them."""
    responses = rows.batch["response_mask"].sum(-1)
    prompts = rows.batch["attention_mask"].sum(-1) - responses
    return len(rows) * int(prompts.max() + responses.max())


def test_dynamic_batches_of_padded_rows_keep_their_budget_with_the_padding_that_they_need():
    """Longer prompts than 20 and longer responses than 20 do not meet: every row alone fits 40 tokens."""
    for seed in range(30):
        generator = random.Random(seed)
        prompts, responses = ([generator.randint(1, 20) for _ in range(24)] for _ in range(2))
        prompt_mask, response_mask = (
            (torch.arange(20) < torch.tensor(lengths)[:, None]).long() for lengths in (prompts, responses)
        )
        batch = DataProto.from_dict(
            {"attention_mask": torch.cat([prompt_mask.flip(1), response_mask], 1), "response_mask": response_mask}
        )
        micro_batches, index_lists = prepare_dynamic_batch(batch, max_token_len=100, packed=False)
        assert max(padded_tokens(rows) for rows in micro_batches) <= 100
        assert len(micro_batches) < 24
        assert sorted(row for rows in index_lists for row in rows) == list(range(24))


def test_a_bin_that_cannot_be_filled_to_the_brim_gets_one_more_micro_batch():
    """Three rows of 6 are 18 tokens, two budgets of 10 in total, but no two of them fit into one."""
    assert len(prepare_dynamic_batch(batch_of([6, 6, 6]), max_token_len=10)[0]) == 3


def test_a_row_longer_than_the_budget_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="row 1 has 30 tokens, a micro-batch may hold 20; raise the micro-batch size"):
        prepare_dynamic_batch(batch_of([5, 30]), max_token_len=20)


def prepare_on_a_rank(rank: int, lengths_of_rank: list[list[int]], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    _, index_lists = prepare_dynamic_batch(batch_of(lengths_of_rank[rank]), max_token_len=10)
    torch.save(index_lists, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_the_number_of_micro_batches(tmp_path):
    """Rank 0 needs four micro-batches, rank 1, with 10 tokens, one; both make four, the heaviest first."""
    lengths_of_rank = [[10, 9, 8, 7], [2, 3, 1, 4]]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(prepare_on_a_rank, args=(lengths_of_rank, str(tmp_path)), nprocs=2)
    assert torch.load(tmp_path / "0.pt") == [[0], [1], [2], [3]]
    assert torch.load(tmp_path / "1.pt") == [[3], [1], [0], [2]]
