# SPDX-License-Identifier: Apache-2.0
"""The trainer's own metrics of a finished step: pure functions from the batch and the timings to names and numbers.

N sequences, P prompt length, R response length, S = P + R. Dashboards rely on the names: `critic/` holds scores and
advantages even if no critic is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch

from verl.protocol import DataProto
from verl.trainer.token_kinds import TokenKind, TokenKinds
from verl.utils.attention_metrics import attention_metrics_from_mass, vgr_from_mass
from verl.utils.response_span import prompt_lengths, response_lengths

PREFIX_HASH = np.uint64(0x9E3779B97F4A7C15)  # an odd number without structure (2^64 / golden ratio)

PHASES_PER_RESPONSE_TOKEN = ("gen", "reward")
"""Phases whose cost grows with the number of response tokens."""
PHASES_PER_TOKEN = ("old", "ref", "values", "adv", "update_critic", "update_actor")
"""Phases whose cost grows with prompt and response tokens."""


def compute_data_metrics(batch: DataProto, has_critic: bool) -> dict[str, float]:
    """Mean, maximum and minimum of scores, rewards, advantages, returns and values, and the lengths.

    `critic/score` and `critic/rewards` are sums per sequence (rewards are scores less the KL penalty, where it is
    part of the reward); `critic/advantages`, `critic/returns` and, where there is a critic, `critic/values` are per
    response token. `critic/vf_explained_var` is 1 - var(returns - values) / var(returns): 1 for a critic that is
    right, 0 for one that only knows the mean. It is left out if all returns are equal.

    Reads: `response_mask`, `token_level_scores`, `token_level_rewards`, `advantages`, `returns` (N, R), with a critic
    `values` (N, R), `attention_mask` (N, S).
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
    if has_critic:
        returns = values["critic/returns"]
        values["critic/values"] = tensors["values"][response_mask]  # (response tokens,)
        if (returns != returns[0]).any():
            unexplained = (returns - values["critic/values"]).var() / returns.var()
            metrics["critic/vf_explained_var"] = 1 - unexplained.item()
    for name, value in values.items():
        metrics |= _spread(name, value)
    return metrics


def compute_length_metrics(batch: DataProto, prefix: str = "") -> dict[str, float]:
    """Lengths in tokens, and `clip_ratio`, the share of sequences that reach the maximum length.

    A response that ends in its last possible token counts as clipped too.

    Reads: `response_mask` (N, R), `attention_mask` (N, S).

    Args:
        prefix: put before both areas; validation uses `val_`.
    """
    tensors = batch.batch
    attention_mask, response_mask = tensors["attention_mask"], tensors["response_mask"]
    response_room = response_mask.shape[-1]
    prompt_room = attention_mask.shape[-1] - response_room
    metrics: dict[str, float] = {}
    for name, lengths, room in (
        ("response_length", response_lengths(response_mask), response_room),
        ("prompt_length", prompt_lengths(attention_mask, response_mask), prompt_room),
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
    response_tokens = batch.batch["response_mask"].sum().item()
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


def compute_rollout_metrics(batch: DataProto, importance_cap: float | None) -> dict[str, float]:
    """How far the log-probabilities of the rollout engine and of the trainer differ.

    `rollout/log_prob_diff_{mean,max}`: absolute difference of the two log-probabilities over the response tokens, in
    nats. If `top_k` or `top_p` exclude tokens, the difference includes the probability that the others gain. With
    importance correction also `rollout/importance_weight_mean`, and `rollout/importance_capped`, the share of tokens
    whose weight is at the cap.

    Reads: `response_mask`, `rollout_log_probs`, `old_log_probs`, and `importance_weights` (N, R) if there are any.

    Args:
        importance_cap: `worker.rollout.importance_cap`; None without importance correction.
    """
    tensors = batch.batch
    is_response = tensors["response_mask"].bool()
    difference = (tensors["rollout_log_probs"] - tensors["old_log_probs"])[is_response].abs()  # (response tokens,)
    metrics = {"log_prob_diff_mean": difference.mean().item(), "log_prob_diff_max": difference.max().item()}
    if importance_cap is not None:
        weights = tensors["importance_weights"][is_response]
        metrics["importance_weight_mean"] = weights.mean().item()
        metrics["importance_capped"] = (weights >= importance_cap).float().mean().item()
    return {f"rollout/{name}": value for name, value in metrics.items()}


def compute_attention_metrics(batch: DataProto) -> dict[str, float]:
    """What the responses attended to; empty if no sample has both modalities.

    `vgr/*`: mean, median and the 10 % and 90 % quantiles over the response tokens that have a VGR.
    `attention/{text,vision}_mass`: share of a token's attention to the prompt (first token aside) that falls on the
    instruction text or on the images. `attention/aei_{text,vision}`: a modality's share of the attention over its
    share of the tokens, above 1 where it gets more than its size. Means over tokens, then over samples with both
    modalities.

    Reads: `response_mask` (N, R), `attention_mass` (N, R, 2), `attention_keys` (N, 2).
    """
    tensors = batch.batch
    mass, keys, response_mask = (tensors[name] for name in ("attention_mass", "attention_keys", "response_mask"))
    vgr = vgr_from_mass(mass, keys)[response_mask.bool()]  # (response tokens,)
    vgr = vgr[vgr.isfinite()]
    if vgr.numel() == 0:
        return {}
    sample_metrics = attention_metrics_from_mass(mass, keys, response_mask)
    both = (keys > 0).all(-1)  # (N,)
    p10, median, p90 = np.quantile(vgr.numpy(), (0.1, 0.5, 0.9)).tolist()
    metrics = {"vgr/mean": vgr.mean().item(), "vgr/median": median, "vgr/p10": p10, "vgr/p90": p90}
    for name in ("text_mass", "vision_mass", "aei_text", "aei_vision"):
        metrics[f"attention/{name}"] = sample_metrics[name][both].nanmean().item()
    return metrics


def compute_token_weight_metrics(
    batch: DataProto, clip_range: tuple[float, float] | None, kinds: TokenKinds | None = None
) -> dict[str, float]:
    """`token_weights/*`: how the weights change the loss. Weights without any effect can be seen here.

    Over response tokens: `mean`, `std`, `min`, `max`; where weights are clipped `clipped_low` and `clipped_high`, the
    shares at or beyond the bounds; `ess`, the effective sample size as a share of the tokens, (sum w)^2 / (n sum w^2),
    1 where all weigh alike. `weighted_rows` is the share of responses in which any token's weight is not 1. Shares of
    all weight: `top10_share`, on the ten percent of tokens with most; with `kinds` also `digit_share`, `word_share`
    and `markup_share` (`TokenKind`), and the tokens' own shares as `digit_tokens`, `word_tokens`, `markup_tokens`.

    Reads: `response_mask`, `token_weights`, with `kinds` `responses` (N, R).
    """
    tensors = batch.batch
    is_response = tensors["response_mask"].bool()
    token_weights = tensors["token_weights"]
    weights = token_weights[is_response]  # (response tokens,)
    weighted_rows = ((token_weights != 1) & is_response).any(-1)  # (N,)
    values = {
        "mean": weights.mean(),
        "std": weights.std(correction=0),
        "min": weights.min(),
        "max": weights.max(),
        "ess": weights.sum() ** 2 / (weights.numel() * weights.square().sum()).clamp(min=1e-12),
        "weighted_rows": weighted_rows.float().mean(),
        "top10_share": _share(weights.topk(math.ceil(weights.numel() / 10)).values, weights),
    }
    if clip_range is not None:
        low, high = torch.tensor(clip_range, dtype=weights.dtype)
        values["clipped_low"] = (weights <= low).float().mean()
        values["clipped_high"] = (weights >= high).float().mean()
    if kinds is not None:
        token_kinds = kinds.classify(tensors["responses"][is_response])  # (response tokens,)
        for kind in TokenKind:
            is_kind = token_kinds == kind
            values[f"{kind.name.lower()}_share"] = _share(weights[is_kind], weights)
            values[f"{kind.name.lower()}_tokens"] = is_kind.float().mean()
    return {f"token_weights/{name}": value.item() for name, value in values.items()}


def compute_cancelled_share(batch: DataProto) -> float:
    """The share of the weighted advantages that cancels between responses of a group with a common prefix.

    Responses to one prompt with the same tokens up to t share the gradient of log pi at t, which enters the loss times
    the sum of w A over them. 1 - (sum over those sums of |sum of w A|) / (sum over tokens of |w A|): 0 where every
    response goes its own way from its first token on, 1 where nothing is left. On short, templated answers most
    tokens are shared, and weights change little.

    Reads: `responses`, `response_mask`, `token_weights`, `advantages` (N, R), `uid`.
    """
    tensors = batch.batch
    is_response = tensors["response_mask"].bool().numpy()  # (N, R)
    weighted_advantages = (tensors["token_weights"] * tensors["advantages"]).double().numpy()  # (N, R)
    _, groups = np.unique(batch.non_tensor_batch["uid"].astype(str), return_inverse=True)
    prefixes = np.zeros(is_response.shape, dtype=np.uint64)  # (N, R), a rolling hash of uid and tokens
    running = _mixed(groups.astype(np.uint64))
    for column, ids in enumerate(tensors["responses"].numpy().astype(np.uint64).T):
        running = prefixes[:, column] = _mixed(running + ids)
    _, nodes = np.unique(prefixes[is_response], return_inverse=True)
    left = np.abs(np.bincount(nodes, weights=weighted_advantages[is_response])).sum()
    return float(1 - left / max(np.abs(weighted_advantages[is_response]).sum(), 1e-12))


def compute_signal_metrics(importance: Mapping[str, torch.Tensor], response_mask: torch.Tensor) -> dict[str, float]:
    """Statistics of the token signals, and how far they agree.

    `signals/<name>/{mean,std,p10,p90}` over the response tokens for which a signal is defined.
    `signals/spearman/<a>_<b>`: the rank correlation of two signals over the tokens of a response, averaged over the
    responses in which both are defined and neither is constant. A signal that is defined nowhere is left out.

    Args:
        importance: (N, R) by the signal's name; NaN where it is undefined.
        response_mask: (N, R).
    """
    import pandas as pd  # comes with datasets; only runs that log signals wait for it

    rows, columns = response_mask.nonzero(as_tuple=True)
    table = pd.DataFrame({name: values[rows, columns].numpy() for name, values in importance.items()})
    table = table.where(np.isfinite(table))
    metrics = {}
    for name, values in table.items():
        if values.notna().any():
            spread = {"mean": values.mean(), "std": values.std(ddof=0)}
            spread |= {"p10": values.quantile(0.1), "p90": values.quantile(0.9)}
            metrics |= {f"signals/{name}/{statistic}": float(value) for statistic, value in spread.items()}
    correlations = table.groupby(rows.numpy()).corr(method="spearman")  # (responses x signals, signals)
    for one, other in combinations(importance, 2):
        response_correlations = correlations.xs(one, level=1)[other]
        if response_correlations.notna().any():
            metrics[f"signals/spearman/{one}_{other}"] = float(response_correlations.mean())
    return metrics


def reduce_metrics(metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of every list, e.g. of one value per sample or per micro-batch.

    Raises:
        ValueError: a list is empty.
    """
    empty = [name for name, values in metrics.items() if len(values) == 0]
    if empty:
        raise ValueError(f"no values to average for {empty}")
    return {name: float(np.mean(values)) for name, values in metrics.items()}


def largest_of_workers(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest value of each metric, from one mapping per worker, all with the same names."""
    return {name: max(worker_metrics[name] for worker_metrics in metrics) for name in metrics[0]}


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Hashes uint64 to uint64: neighbouring numbers end up far apart."""
    numbers = (numbers + np.uint64(1)) * PREFIX_HASH
    numbers = (numbers ^ (numbers >> np.uint64(30))) * PREFIX_HASH
    return numbers ^ (numbers >> np.uint64(27))


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return part.sum() / whole.sum().clamp(min=1e-12)


def _spread(name: str, values: torch.Tensor) -> dict[str, float]:
    values = values.float()
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/max": values.max().item(),
        f"{name}/min": values.min().item(),
    }
