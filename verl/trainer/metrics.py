# SPDX-License-Identifier: Apache-2.0
"""The trainer's own metrics of a finished step: pure functions from the batch and the timings to names and numbers.

N sequences, P prompt length, R response length, S = P + R. The names are those that dashboards are built on; `critic/`
is the area of scores and advantages even where no critic is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from verl.protocol import DataProto

PHASES_PER_RESPONSE_TOKEN = ("gen", "reward")
"""Phases whose cost grows with what is generated."""
PHASES_PER_TOKEN = ("old", "ref", "values", "adv", "update_critic", "update_actor")
"""Phases that read prompts and responses alike."""


def compute_data_metrics(batch: DataProto) -> dict[str, float]:
    """Mean, maximum and minimum of scores, rewards, advantages and returns, and the lengths.

    `critic/score` and `critic/rewards` are sums per sequence (rewards are scores less the KL penalty, where it is
    part of the reward); `critic/advantages` and `critic/returns` are per response token.

    Reads: `responses`, `response_mask`, `token_level_scores`, `token_level_rewards`, `advantages`, `returns` (N, R),
    `attention_mask` (N, S).
    """
    tensors = batch.batch
    response_mask = tensors["response_mask"].bool()  # (N, R)
    values = {
        "critic/score": tensors["token_level_scores"].sum(-1),  # (N,)
        "critic/rewards": tensors["token_level_rewards"].sum(-1),  # (N,)
        "critic/advantages": tensors["advantages"][response_mask],  # (response tokens,)
        "critic/returns": tensors["returns"][response_mask],  # (response tokens,)
    }
    metrics = compute_length_metrics(batch)
    for name, value in values.items():
        metrics |= _spread(name, value)
    return metrics


def compute_length_metrics(batch: DataProto, prefix: str = "") -> dict[str, float]:
    """Lengths in tokens, and `clip_ratio`, the share of sequences that fill all the room there is.

    A response that ends in its last possible token counts as clipped too.

    Reads: `response_mask` (N, R), `attention_mask` (N, S).

    Args:
        prefix: put before both areas; validation uses `val_`.
    """
    tensors = batch.batch
    response_room = tensors["response_mask"].shape[-1]
    prompt_room = tensors["attention_mask"].shape[-1] - response_room
    metrics: dict[str, float] = {}
    for name, lengths, room in (
        ("response_length", _response_lengths(batch), response_room),
        ("prompt_length", tensors["attention_mask"][:, :prompt_room].sum(-1), prompt_room),
    ):
        metrics |= _spread(prefix + name, lengths)
        metrics[f"{prefix}{name}/clip_ratio"] = (lengths == room).float().mean().item()
    return metrics


def compute_timing_metrics(batch: DataProto, timings: Mapping[str, float]) -> dict[str, float]:
    """`timing_per_token_ms/<phase>`: milliseconds over the response tokens for `gen` and `reward`, over all tokens for
    the phases that read whole sequences; phases that did not run are left out.

    Reads: `response_mask` (N, R), `attention_mask` (N, S).

    Args:
        timings: seconds by phase, as `StepRecord.timings` holds them.
    """
    response_tokens = _response_lengths(batch).sum().item()
    all_tokens = batch.batch["attention_mask"].sum().item()
    tokens = dict.fromkeys(PHASES_PER_RESPONSE_TOKEN, response_tokens) | dict.fromkeys(PHASES_PER_TOKEN, all_tokens)
    return {
        f"timing_per_token_ms/{phase}": timings[phase] * 1000 / count
        for phase, count in tokens.items()
        if phase in timings
    }


def compute_throughput_metrics(batch: DataProto, timings: Mapping[str, float], num_devices: int) -> dict[str, float]:
    """Tokens of the step (prompts and responses), its seconds, and tokens per second and device.

    Reads: `attention_mask` (N, S).

    Args:
        timings: seconds by phase; `step` is the whole step.
        num_devices: devices the step ran on.
    """
    num_tokens = batch.batch["attention_mask"].sum().item()
    return {
        "perf/total_num_tokens": num_tokens,
        "perf/time_per_step": timings["step"],
        "perf/throughput": num_tokens / (timings["step"] * num_devices),
    }


def reduce_metrics(metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of every list, e.g. of one value per sample or per micro-batch.

    Raises:
        ValueError: a list is empty.
    """
    empty = [name for name, values in metrics.items() if len(values) == 0]
    if empty:
        raise ValueError(f"no values to average for {empty}")
    return {name: float(np.mean(values)) for name, values in metrics.items()}


def _response_lengths(batch: DataProto) -> torch.Tensor:
    return batch.batch["response_mask"].sum(-1)  # (N,)


def _spread(name: str, values: torch.Tensor) -> dict[str, float]:
    values = values.float()
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/max": values.max().item(),
        f"{name}/min": values.min().item(),
    }
