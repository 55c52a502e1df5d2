# SPDX-License-Identifier: Apache-2.0
"""Turns the importance of response tokens into their weights in the loss: smoothed, of mean one, clipped.

Also what VGR says of importance, the lists that a reward function gives, and the shape that a batch needs. The
attention itself is measured in `attention_metrics`, and other signals are in `verl/algorithms/token_weights.py`.

Shapes: N samples, P prompt length, R response length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch.nn import functional

from verl.utils.attention_metrics import (
    classify_generated,
    count_keys,
    mass_from_attentions,
    vgr_from_mass,
)

BISECTIONS = 50
"""Of the logarithm of a factor on weights: beyond what float32 can tell for any importance."""

LARGEST_IMPORTANCE = 1e100
"""Sums of it are finite."""

EPSILON = 1e-12
"""Keeps the inverse of a VGR of zero finite. VGR has no unit, so no number of keys enters, and beside any VGR above
1e-5 it is less than float32 can tell."""


def build_token_vgr_weights_for_batch(
    outputs_attentions: Sequence[Sequence[torch.Tensor | None]] | None,
    input_ids: torch.Tensor,
    sequences: torch.Tensor,
    processor: Any,
    image_grid_thw: torch.Tensor | None = None,
    exclude_special: bool = True,
    smooth_sigma: float = 0.0,
    clip_range: tuple[float, float] = (0.2, 3.0),
    last_k_layers: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> tuple[list[list[float]], dict[str, list[list[float]]]]:
    """Token weights from Hugging Face `generate(output_attentions=True)`, for notebooks and reward functions.

    The same numbers as in training, where they come from the log-prob pass, provided that all layers given are of full
    attention. Images are found by the tokens that stand for them, so `image_grid_thw` is taken only because callers
    have it: it is not read.

    Args:
        outputs_attentions: steps x layers x (N, H, queries, keys). Layers may be None. Those that attend through a
            window, as Gemma 3's sliding ones, have to be None, or left out: then `last_k_layers` does not count them,
            as in training. None or empty where nothing was collected.
        input_ids: (N, P) prompts, possibly left-padded.
        sequences: (N, P + R) what `generate` returned.
        processor: of a Qwen-VL model, or any that names its `image_token_id`.
        exclude_special: False counts special tokens of the prompt as instruction text.
        smooth_sigma, clip_range: as in `token_weights_from_vgr`.
        last_k_layers: use this many of the last layers. None, or more than there are, uses each one that is there.
        eos_token_id: what `generate` stopped at, `model.generation_config.eos_token_id`; None takes the tokenizer's.

    Returns:
        The weights of each sample, one per response token up to and including the first end-of-sequence token; and
        under `vgr_token`, `p_text` and `p_vision` lists of the same lengths: VGR (NaN where undefined) and the shares
        of the attention to the prompt that fall on text and on images. Lists are empty where nothing was collected.

    Raises:
        ValueError: as `mass_from_attentions`, `classify_generated` and `token_weights_from_vgr`.
    """
    if not outputs_attentions:
        empty: list[list[float]] = [[] for _ in input_ids]
        return empty, {name: [[] for _ in input_ids] for name in ("vgr_token", "p_text", "p_vision")}
    key_kinds, response_mask = classify_generated(input_ids, sequences, processor, exclude_special, eos_token_id)
    mass = mass_from_attentions(outputs_attentions, key_kinds, response_mask.shape[1], last_k_layers)  # (N, R, 2)
    keys = count_keys(key_kinds)  # (N, 2)
    vgr = vgr_from_mass(mass, keys)  # (N, R)
    weights = token_weights_from_vgr(vgr, response_mask, clip_range, smooth_sigma)
    streams = {"weights": weights, "vgr_token": vgr, "p_text": mass[..., 0], "p_vision": mass[..., 1]}
    lists = {
        name: [row[is_token].tolist() for row, is_token in zip(values, response_mask.bool(), strict=True)]
        for name, values in streams.items()
    }
    return lists.pop("weights"), lists


def token_weights_from_vgr(
    vgr: torch.Tensor,
    response_mask: torch.Tensor,
    clip_range: tuple[float, float] = (0.2, 3.0),
    smooth_sigma: float = 0.0,
) -> torch.Tensor:
    """Weights that grow with the attention to images: (N, R) float32, 0 outside the responses.

    1 / VGR, smoothed along the response if asked for, over its mean over the response, clipped. Tokens whose VGR is
    not finite take no part in smoothing and mean and weigh exactly 1, as do single tokens and equal ones. The mean is
    one before clipping; after it, it is not restored.

    `EPSILON` is added to every VGR, so that a token without any attention on text has the highest weight and no
    infinite one.

    Args:
        vgr: (N, R). response_mask: (N, R), 1 on response tokens.
        clip_range: lowest and highest weight.
        smooth_sigma: width of the gaussian, in tokens; 0 leaves the weights as they are.

    Raises:
        ValueError: `clip_range` is not 0 <= low <= 1 <= high, or `smooth_sigma` is below 0.
    """
    return weights_from_importance(importance_from_vgr(vgr), response_mask, clip_range, smooth_sigma)


def importance_from_vgr(vgr: torch.Tensor) -> torch.Tensor:
    """1 / (VGR + `EPSILON`), (N, R) float64: how much a token looks at the images; NaN where VGR is not finite."""
    # In double precision equal weights come out as exactly 1, and padding cannot show in the order of a sum.
    return torch.where(vgr.isfinite(), 1 / (vgr.double() + EPSILON), torch.nan)


def weights_from_importance(
    importance: torch.Tensor,
    response_mask: torch.Tensor,
    clip_range: tuple[float, float] = (0.2, 3.0),
    smooth_sigma: float = 0.0,
    conserve_mean: bool = False,
    top_share: float | None = None,
) -> torch.Tensor:
    """Weights in proportion to importance: (N, R) float32, 0 outside the responses.

    Importance is smoothed along the response if asked for, divided by its mean over the response, and clipped. Tokens
    whose importance is not finite take no part in smoothing and mean and weigh exactly 1. Where the importance of all
    tokens is 0, all weigh 1.

    Args:
        importance: (N, R), 0 or above where it is finite.
        response_mask: (N, R), 1 on response tokens.
        clip_range: lowest and highest weight.
        smooth_sigma: width of the gaussian, in tokens; 0 leaves the importance as it is.
        conserve_mean: rescale before clipping so that the mean of each response is one after it: its weights are
            clip(c w), with the c for which their mean is one; or nearest to one where the bounds keep it away, as with
            a high bound of 3 where less than a third of the tokens have any importance.
        top_share: instead of clipping, weigh this share of each response's tokens, the most important ones, 1 and the
            others 0 (VPPO, arXiv 2510.09285, its gradient filter). The share counts the tokens that take part and is
            rounded up; among equals the earlier are chosen. With `conserve_mean` the chosen share the weight of all.

    Raises:
        ValueError: `clip_range` is not 0 <= low <= 1 <= high, `smooth_sigma` is below 0, `top_share` is not above 0
            and at most 1, or an importance is negative.
    """
    low, high = clip_range
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"clip_range={tuple(clip_range)} is not (low, high) with 0 <= low <= 1 <= high")
    if not 0 <= smooth_sigma < math.inf:
        raise ValueError(f"smooth_sigma={smooth_sigma} is not 0 or a number above it")
    if top_share is not None and not 0 < top_share <= 1:
        raise ValueError(f"top_share={top_share} is not above 0 and at most 1")
    is_response = response_mask.bool()
    takes_part = is_response & importance.isfinite()
    weights = torch.where(takes_part, importance.double(), 0)
    is_outside = (weights < 0) | (weights > LARGEST_IMPORTANCE)
    if is_outside.any():
        row, column = is_outside.nonzero()[0].tolist()
        value = weights[row, column].item()
        raise ValueError(f"token {column} of response {row} has importance {value}, not between 0 and 1e100")
    takes_part &= weights.sum(dim=1, keepdim=True) > 0
    if smooth_sigma > 0 and takes_part.any():
        weights = _smooth(weights, takes_part, smooth_sigma)
    if top_share is None:
        weights = _clip(weights / _mean(weights, takes_part), takes_part, clip_range, conserve_mean)
    else:
        weights = _choose_top(weights, takes_part, top_share, conserve_mean)
    return torch.where(is_response, torch.where(takes_part, weights, 1), 0).float()


def token_weights_from_lists(lists: Sequence[Any], response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as a reward function gives them: (N, R) float32, 0 outside the responses, and (N,) bool who has any.

    A list shorter than its response is filled up with 1.0; samples without one weigh 1. An empty list is none: so
    `build_token_vgr_weights_for_batch` says that there were no attentions.

    Args:
        lists: per sample a list (or array, or tensor) of numbers, or None.
        response_mask: (N, R), 1 on response tokens.

    Raises:
        ValueError: not one entry per sample, an entry that is no list of finite numbers not below 0, or one that is
            longer than its response.
    """
    if len(lists) != len(response_mask):
        raise ValueError(f"token_weights has {len(lists)} entries for {len(response_mask)} samples; give one for each")
    weights = response_mask.to(torch.float32, copy=True)  # (N, R)
    is_given = torch.zeros(len(lists), dtype=torch.bool, device=weights.device)
    for index, (given, is_token) in enumerate(zip(lists, response_mask.bool(), strict=True)):
        columns = is_token.nonzero()[:, 0]
        numbers = [] if given is None else _checked_weights(given, index, len(columns))
        weights[index, columns[: len(numbers)]] = torch.tensor(numbers, device=weights.device)
        is_given[index] = bool(numbers)
    return weights, is_given


def align_token_weights(token_weights: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Weights in the mask's shape (N, R), float32 on its device: cut on the right, or filled up with 1.0 there.

    Args:
        token_weights: (N, any length). response_mask: (N, R).
    """
    missing = response_mask.shape[1] - token_weights.shape[1]  # a negative pad cuts
    aligned = functional.pad(token_weights.float(), (0, missing), value=1.0)
    return aligned.to(response_mask.device)


def _mean(weights: torch.Tensor, takes_part: torch.Tensor) -> torch.Tensor:
    """(N, 1), over the tokens of each response that take part; NaN where none does."""
    return torch.where(takes_part, weights, 0).sum(dim=1, keepdim=True) / takes_part.sum(dim=1, keepdim=True)


def _clip(
    weights: torch.Tensor, takes_part: torch.Tensor, clip_range: tuple[float, float], conserve_mean: bool
) -> torch.Tensor:
    """Weights of mean one, clipped; with `conserve_mean` rescaled first, so that their mean is one afterwards."""
    if not conserve_mean:
        return weights.clamp(*clip_range)
    positive = takes_part & (weights > 0)
    largest = torch.where(positive, weights, 0).amax(dim=1, keepdim=True)  # (N, 1)
    smallest = torch.where(positive, weights, torch.inf).amin(dim=1, keepdim=True)  # (N, 1)
    # With the first factor no weight is above one, with the second none but zeros is below the upper bound.
    log_low, log_high = -largest.log(), math.log(clip_range[1]) - smallest.log()
    for _ in range(BISECTIONS):
        middle = (log_low + log_high) / 2
        is_too_small = _mean((middle.exp() * weights).clamp(*clip_range), takes_part) < 1
        log_low, log_high = torch.where(is_too_small, middle, log_low), torch.where(is_too_small, log_high, middle)
    return (log_high.exp() * weights).clamp(*clip_range)


def _choose_top(
    importance: torch.Tensor, takes_part: torch.Tensor, top_share: float, conserve_mean: bool
) -> torch.Tensor:
    counts = takes_part.sum(dim=1, keepdim=True)  # (N, 1)
    chosen_counts = (counts.double() * top_share - 1e-9).ceil()  # (N, 1); 0.1 x 30 is not to give 4
    order = torch.where(takes_part, importance, -1).argsort(dim=1, descending=True, stable=True)
    chosen = (order.argsort(dim=1) < chosen_counts) & takes_part
    return chosen * (counts / chosen_counts if conserve_mean else 1.0)


def _smooth(weights: torch.Tensor, takes_part: torch.Tensor, sigma: float) -> torch.Tensor:
    """A gaussian mean along (N, R) over the tokens that take part, the kernel renormalised where it lacks others."""
    half = min(max(1, math.floor(3 * sigma)), weights.shape[1])  # no two tokens are further apart
    offsets = torch.arange(-half, half + 1, dtype=weights.dtype, device=weights.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)[None, None]  # (1, 1, 2 half + 1)
    present = takes_part.to(weights.dtype)
    sums = functional.conv1d(torch.stack([weights * present, present])[:, :, None].flatten(0, 1), kernel, padding=half)
    numerator, denominator = sums[:, 0].unflatten(0, (2, len(weights)))  # each (N, R)
    return torch.where(takes_part, numerator / denominator, 0)


def _checked_weights(given: Any, index: int, length: int) -> list[float]:
    tolist = getattr(given, "tolist", None)
    numbers = tolist() if callable(tolist) else given
    if not isinstance(numbers, (list, tuple)):
        raise ValueError(f"token_weights of sample {index} is {given!r}; it must be a list of numbers, or None")
    for position, number in enumerate(numbers):
        is_number = isinstance(number, Real) and not isinstance(number, bool)
        if not is_number or not 0 <= number <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"token_weights of sample {index} has {number!r} at token {position}; every weight must be a finite "
                "number, 0 or above"
            )
    if len(numbers) > length:
        raise ValueError(
            f"token_weights of sample {index} has {len(numbers)} weights for a response of {length} tokens; give at "
            "most one for each"
        )
    return [float(number) for number in numbers]
