# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the back end `triton` of attention_mass.py. Only this file imports the package.

One program handles a block of a sample's queries for one head and streams over the sample's keys, kind by kind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from verl.models.kernels.attention_mass import KeyPlan, SamplePlan

_TABLE_WIDTH = tl.constexpr(len(SamplePlan._fields))
_LOG2_E = tl.constexpr(1.4426950408889634)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    plan: KeyPlan,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments and result as in `attention_mass.chunked`."""
    plan = plan.to(query.device)
    # The interpreter multiplies the bits of bfloat16 as if they were integers; in float32 the products are the same.
    if query.dtype == torch.float64 or triton.knobs.runtime.interpret:
        query, key = query.float(), key.float()
    heads, dimension = query.shape[1], query.shape[3]
    masses = query.new_zeros(plan.num_samples, heads, plan.response_length, 3, dtype=torch.float32)
    if plan.samples:
        blocks = block_sizes(dimension, query.element_size())
        most_queries = max(sample.num_queries for sample in plan.samples)
        attention_mass_kernel[(triton.cdiv(most_queries, blocks["BLOCK_QUERIES"]), heads, len(plan.samples))](
            query,
            key,
            masses,
            masses if sinks is None else sinks.contiguous(),  # not read without sinks
            plan.table,
            plan.query_positions,
            plan.result_columns,
            plan.key_positions,
            *query.stride(),
            *key.stride(),
            *masses.stride()[:3],
            scaling,
            0.0 if softcap is None else softcap,
            GROUP_SIZE=heads // key.shape[1],
            DIMENSION=dimension,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            **blocks,
        )
    return masses.mean(dim=1)  # (N, R, 3)


def block_sizes(dimension: int, element_size: int) -> dict[str, int]:
    """Sizes of the blocks, and the warps and loop stages they are compiled for.

    Up to 256 dimensions a program needs less than 99 KB of shared memory, which every GPU since Ampere has, and in
    half precision no register spills. float32 runs without tensor cores and serves comparisons.
    """
    padded = max(16, triton.next_power_of_2(dimension))
    if element_size == 4:
        sizes = dict(BLOCK_QUERIES=32, BLOCK_KEYS=32, num_warps=8, num_stages=2)
    elif padded <= 128:
        sizes = dict(BLOCK_QUERIES=128, BLOCK_KEYS=64, num_warps=8, num_stages=3)
    else:
        sizes = dict(BLOCK_QUERIES=64, BLOCK_KEYS=32, num_warps=4, num_stages=2)
    return dict(BLOCK_DIMENSION=padded, **sizes)


@triton.jit
def _add_up(
    query_block,
    highest,
    keys,
    positions,
    key_stride_position,
    start,
    end,
    num_visible,
    scaling,
    softcap,
    DIMENSION: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
):
    """Sum over the keys number `start` to `end` of 2 ** (score - highest score so far), and that highest score.

    query_block: (Q, D). highest: (Q,) of the keys before, in units of log2(e). keys: (D, 1) pointers. num_visible:
    (Q,) number of the sample's keys that each query sees.
    """
    total = tl.zeros_like(highest)
    inside = (tl.arange(0, BLOCK_DIMENSION) < DIMENSION)[:, None]
    for left in range(start, end, BLOCK_KEYS):
        numbers = left + tl.arange(0, BLOCK_KEYS)
        key_positions = tl.load(positions + numbers, mask=numbers < end, other=0)
        key_block = tl.load(
            keys + key_positions[None, :] * key_stride_position, mask=inside & (numbers < end)[None, :], other=0.0
        )  # (D, K)
        scores = tl.dot(query_block, key_block, input_precision="ieee") * scaling  # (Q, K)
        if HAS_SOFTCAP:
            shrunk = tl.exp(-2.0 * tl.abs(scores / softcap))
            magnitude = softcap * (1.0 - shrunk) / (1.0 + shrunk)
            scores = tl.where(scores < 0.0, -magnitude, magnitude)
        if ALL_VISIBLE:
            visible = (numbers < end)[None, :]
        else:
            visible = (numbers < end)[None, :] & (numbers[None, :] < num_visible[:, None])
        scores = tl.where(visible, scores * _LOG2_E, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[:, None]), axis=1)
        highest = higher
    return total, highest


@triton.jit
def attention_mass_kernel(
    query,
    key,
    masses,
    sinks,
    table,
    query_positions,
    result_columns,
    key_positions,
    query_stride_batch,
    query_stride_head,
    query_stride_position,
    query_stride_dimension,
    key_stride_batch,
    key_stride_head,
    key_stride_position,
    key_stride_dimension,
    mass_stride_row,
    mass_stride_head,
    mass_stride_column,
    scaling,
    softcap,
    GROUP_SIZE: tl.constexpr,
    DIMENSION: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
):
    """Masses (N, H, R, 3), before the mean over heads. Grid: blocks of queries, heads, samples of the plan's table."""
    sample = table + tl.program_id(2) * _TABLE_WIDTH
    row = tl.load(sample)
    batch_row = tl.load(sample + 1)
    first_query = tl.load(sample + 2)
    num_queries = tl.load(sample + 3)
    first_key = tl.load(sample + 4)
    end_of_sink = tl.load(sample + 8)

    first = tl.program_id(0) * BLOCK_QUERIES
    if first >= num_queries:
        return
    head = tl.program_id(1).to(tl.int64)
    numbers = first + tl.arange(0, BLOCK_QUERIES)
    real = numbers < num_queries
    positions = tl.load(query_positions + first_query + numbers, mask=real, other=0)
    dimensions = tl.arange(0, BLOCK_DIMENSION)
    query_block = tl.load(
        query
        + batch_row * query_stride_batch
        + head * query_stride_head
        + positions[:, None] * query_stride_position
        + dimensions[None, :] * query_stride_dimension,
        mask=real[:, None] & (dimensions < DIMENSION)[None, :],
        other=0.0,
    )  # (Q, D)
    keys = key + batch_row * key_stride_batch + (head // GROUP_SIZE) * key_stride_head
    keys += dimensions[:, None] * key_stride_dimension  # (D, 1)
    own_positions = key_positions + first_key
    num_visible = end_of_sink + numbers

    # The extra score enters the last sum as one key. Where there is none it is so low that the first block wipes it
    # out, but finite: a kind may have no keys, and the difference of two infinities is not a number.
    highest = tl.full([BLOCK_QUERIES], -1.0e30, tl.float32)
    if HAS_SINKS:
        highest = tl.zeros_like(highest) + tl.load(sinks + head).to(tl.float32) * _LOG2_E
    rest = tl.full([BLOCK_QUERIES], 1.0, tl.float32)
    text = tl.zeros_like(rest)
    vision = tl.zeros_like(rest)
    other = tl.zeros_like(rest)

    # One loop a kind, and no branch inside it around a load, which would keep the compiler from loading ahead.
    start = 0
    for kind in tl.static_range(4):
        if kind < 3:
            end = tl.load(sample + 5 + kind)
        else:  # the sink and the response's keys, to the last that a query of this block sees
            end = end_of_sink + tl.minimum(first + BLOCK_QUERIES, num_queries) - 1
        total, higher = _add_up(
            query_block,
            highest,
            keys,
            own_positions,
            key_stride_position,
            start,
            end,
            num_visible,
            scaling,
            softcap,
            DIMENSION,
            HAS_SOFTCAP,
            kind != 3,
            BLOCK_KEYS,
            BLOCK_DIMENSION,
        )
        scale = tl.exp2(highest - higher)
        text *= scale
        vision *= scale
        other *= scale
        rest *= scale
        highest = higher
        start = end
        if kind == 0:
            text += total
        elif kind == 1:
            vision += total
        elif kind == 2:
            other += total
        else:
            rest += total

    everything = text + vision + other + rest
    columns = tl.load(result_columns + first_query + numbers, mask=real, other=0)
    place = masses + row * mass_stride_row + head * mass_stride_head + columns * mass_stride_column
    tl.store(place, text / everything, mask=real)
    tl.store(place + 1, vision / everything, mask=real)
    tl.store(place + 2, (text + vision + other) / everything, mask=real)
