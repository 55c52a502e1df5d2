# SPDX-License-Identifier: Apache-2.0
"""Token weights: which signal says how important a token is, how importance becomes a weight, and the controls.

A signal is a function in `TOKEN_SIGNALS`, found by `algorithm.token_weight_signal`. The names of its arguments are the
streams that it needs; it returns the raw importance (N, R) of each response token, 0 or above, NaN where it is
undefined. Smoothing, mean one and clipping are the same for all signals (`verl/utils/attention_token_weights.py`).

Shapes: N sequences, R response length.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from verl.algorithms.registry import Registry
from verl.trainer.config import AlgorithmConfig
from verl.utils.attention_metrics import vgr_from_mass
from verl.utils.attention_token_weights import (
    BISECTIONS,
    importance_from_vgr,
    token_weights_from_lists,
    weights_from_importance,
)

MEASURED_STREAMS = ("entropy", "image_kl", "hidden_cosine", "attention_mass", "attention_keys")
"""What the log-prob pass measures for the signals that ask for it."""

PRESENT_STREAMS = ("responses", "response_mask", "old_log_probs", "rollout_log_probs")
"""What else a signal may ask for: these are in every run."""

LOG_KEY = "algorithm.token_signals_to_log"

LARGEST_LOG_SPREAD = 20.0
"""Bounds of the search in the control `random`. At the lower one the weights are equal in float32; at the upper one a
single token has all the weight."""

TokenSignal = Callable[..., torch.Tensor]

TOKEN_SIGNALS: Registry[TokenSignal] = Registry("token signal", "algorithm.token_weight_signal")
register_token_signal = TOKEN_SIGNALS.register


@register_token_signal("vgr")
def inverse_vgr(attention_mass: torch.Tensor, attention_keys: torch.Tensor) -> torch.Tensor:
    """The attention density on the image over the one on the text: 1 / VGR (`vgr_from_mass`, which names the source).

    Undefined for responses whose prompt has no text or no image.
    """
    return importance_from_vgr(vgr_from_mass(attention_mass, attention_keys))


@register_token_signal("vision_density")
def vision_density(attention_mass: torch.Tensor, attention_keys: torch.Tensor) -> torch.Tensor:
    """The numerator of 1 / VGR alone: attention on the image per image token.

    Undefined for responses whose prompt has no image.
    """
    count = attention_keys[:, 1:].to(attention_mass.device)  # (N, 1)
    return torch.where(count > 0, attention_mass[..., 1].double() / count.clamp(min=1), torch.nan)


@register_token_signal("entropy")
def policy_entropy(entropy: torch.Tensor) -> torch.Tensor:
    """Entropy of the policy where it drew the token, in nats ("Beyond the 80/20 Rule", arXiv 2506.01939, section 3).

    Our delta: at the sampler's temperature and over the tokens that it can draw.
    """
    return entropy


@register_token_signal("image_kl")
def image_divergence(image_kl: torch.Tensor) -> torch.Tensor:
    """KL of the policy from itself with degraded images, in nats (VPPO, arXiv 2510.09285; PAPO, arXiv 2507.06448).

    Our deltas:

    1. Over the whole vocabulary instead of an estimate from the drawn token.
    2. How images are degraded: `verl/data/image_noise.py`. All copies of an image are degraded alike, in every step.

    0 for responses whose prompt has no image, so that their tokens weigh 1. Costs a pass without gradient.
    """
    return image_kl.clamp(min=0)  # rounding may put the smallest below 0


@register_token_signal("hidden_cosine")
def image_similarity(hidden_cosine: torch.Tensor) -> torch.Tensor:
    """(1 + c) / 2, c the cosine of the token's last hidden state and the mean state of the prompt's image tokens.

    Source: VGPO, arXiv 2604.09349; PEPO, arXiv 2603.22847.

    Our deltas:

    1. The state is the one that predicts the token, as for its log-probability.
    2. (1 + c) / 2 is an importance: 0 or above. The papers gate or rescale the cosine further.

    Undefined for responses whose prompt has no image.
    """
    return (1 + hidden_cosine) / 2


@register_token_signal("uniform")
def uniform(response_mask: torch.Tensor) -> torch.Tensor:
    """All tokens alike: every weight is exactly 1."""
    return torch.ones(response_mask.shape)


# ---- which signals a run has ----


@dataclass(frozen=True)
class Signal:
    """A signal as a run uses it."""

    name: str
    """In metrics: the registered name, or the function's in a user's file."""
    function: TokenSignal
    streams: tuple[str, ...]
    """What it needs."""

    @property
    def needs_attention(self) -> bool:
        """Whether `worker.rollout.collect_attentions` has to measure for it."""
        return any(name.startswith("attention_") for name in self.streams)

    def importance(self, streams: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(N, R) float64, the raw importance; NaN where it is undefined.

        The function is given copies, so that nothing it writes into them reaches the batch.

        Raises:
            RuntimeError: the function raised.
            ValueError: it returned another shape than the response mask's, or an importance below 0.
        """
        given = {name: streams[name].clone() for name in self.streams}
        try:
            values = self.function(**given)
        except Exception as error:
            raise RuntimeError(f"the token signal {self.name} raised {type(error).__name__}: {error}") from error
        shape = tuple(streams["response_mask"].shape)
        if not isinstance(values, torch.Tensor) or tuple(values.shape) != shape:
            returned = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"the token signal {self.name} returned {returned}; it must return a tensor {shape}")
        values = values.double()
        negative = ((values < 0) & streams["response_mask"].bool()).nonzero().tolist()
        if negative:
            row, column = negative[0]
            raise ValueError(
                f"the token signal {self.name} gives token {column} of response {row} the importance "
                f"{values[row, column].item():g}; it must be 0 or above, or NaN where there is none"
            )
        return values


def find_signal(reference: str, key: str = TOKEN_SIGNALS.key) -> Signal:
    """The signal of a name out of `TOKEN_SIGNALS` or of a `path.py:function`.

    Args:
        key: of the configuration that names it, for messages.

    Raises:
        ValueError: there is none, or it asks for a stream that no run has.
    """
    return _signal(reference, TOKEN_SIGNALS.find(reference, key))


@lru_cache
def _signal(reference: str, function: TokenSignal) -> Signal:
    name = reference.rpartition(":")[2]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the token signal {reference} does not say what its arguments are: {error}") from error
    if any(one.kind is one.POSITIONAL_ONLY for one in parameters):
        raise ValueError(f"the token signal {reference} takes arguments by position; it is given streams by name")
    known = (*MEASURED_STREAMS, *PRESENT_STREAMS)
    wanted = [one.name for one in parameters if one.default is one.empty or one.name in known]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"the token signal {reference} asks for {', '.join(unknown)}; it may ask for {', '.join(known)}"
        )
    return Signal(name, function, tuple(wanted))


def signals_of(algorithm: AlgorithmConfig) -> dict[str, Signal]:
    """The signals of a run by their names in metrics: the one that weighs tokens, then those that are only logged."""
    used = [algorithm.token_weight_signal] if algorithm.enable_token_weights else []
    signals: dict[str, Signal] = {}
    named = [find_signal(reference) for reference in used]
    named += [find_signal(reference, LOG_KEY) for reference in algorithm.token_signals_to_log]
    for signal in named:
        if signals.setdefault(signal.name, signal) is not signal:
            raise ValueError(f"two token signals are named {signal.name}; rename the function of one")
    return signals


def measured_streams(algorithm: AlgorithmConfig, collects_attention: bool) -> list[str]:
    """The streams out of `MEASURED_STREAMS` that a run's log-prob pass measures."""
    needed = {name for signal in signals_of(algorithm).values() for name in signal.streams}
    attention = {"attention_mass", "attention_keys"}
    needed = needed | attention if collects_attention else needed - attention
    return [name for name in MEASURED_STREAMS if name in needed]


# ---- from importance to weights ----


def compute_token_weights(
    importance: torch.Tensor | None,
    lists: Sequence[Any] | None,
    responses: torch.Tensor | None,
    response_mask: torch.Tensor,
    algorithm: AlgorithmConfig,
    step: int,
) -> torch.Tensor | None:
    """A batch's weights: (N, R) float32, 0 outside the responses; None if no source gives any.

    Weights that the reward function returned take precedence, sample by sample, as they are. Other samples take
    weights from the signal's importance, or 1 where it is undefined. The control is applied last.

    Args:
        importance: (N, R) of the run's signal; None where it could not be measured.
        lists: what the reward function returned, as `token_weights_from_lists` takes it; None if it returned nothing.
        responses: (N, R) token ids, which seed the control of each response; None where the control draws nothing.
        response_mask: (N, R), 1 on response tokens.
        algorithm: the keys `token_weight_*`.
        step: of the training, from 1 on.

    Raises:
        ValueError: as `token_weights_from_lists` and `weights_from_importance`.
    """
    control = CONTROLS[algorithm.token_weight_control]
    lists = [None] * len(response_mask) if lists is None else lists
    given, is_given = token_weights_from_lists(lists, response_mask)
    if importance is None and not is_given.any():
        return None
    ones = response_mask.to(torch.float32, copy=True)
    weights = ones if importance is None else _shape(importance, response_mask, algorithm, step)
    if is_given.any():
        if control.inverts:
            given = _inverse_of_given(given, response_mask)
        weights = torch.where(is_given[:, None], given, weights)
    if control.draw is None:
        return weights
    assert responses is not None, "a control that draws needs the responses"
    for row, (ids, is_token) in enumerate(zip(responses, response_mask.bool(), strict=True)):
        weights[row, is_token] = control.draw(weights[row, is_token], _generator_of(ids[is_token], step))
    return weights


def _shape(
    importance: torch.Tensor, response_mask: torch.Tensor, algorithm: AlgorithmConfig, step: int
) -> torch.Tensor:
    """Weights of a signal, warmed up: 1 + s (w - 1), where s goes from 0 in the first step to 1."""
    if CONTROLS[algorithm.token_weight_control].inverts:
        importance = _reciprocal(importance, response_mask)
    weights = weights_from_importance(
        importance,
        response_mask,
        algorithm.token_weight_clip,
        algorithm.token_weight_smooth_sigma,
        algorithm.token_weight_conserve_mean,
        algorithm.token_weight_top_share,
    )
    warmup_steps = algorithm.token_weight_warmup_steps
    if warmup_steps == 0 or step > warmup_steps:
        return weights
    return torch.lerp(response_mask.float(), weights, (step - 1) / warmup_steps)


def _reciprocal(importance: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """1 / importance. Importance below 1/100 of the response's largest is first raised to that bound."""
    is_defined = response_mask.bool() & importance.isfinite()
    largest = torch.where(is_defined, importance, 0).amax(dim=1, keepdim=True)  # (N, 1)
    return torch.where(is_defined & (largest > 0), 1 / torch.maximum(importance, largest / 100), torch.nan)


def _inverse_of_given(given: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Reciprocals of the reward function's weights; each response keeps its mean, and nothing is clipped."""
    reciprocal = _reciprocal(given.double(), response_mask).nan_to_num(0.0)  # (N, R)
    scale = given.double().sum(dim=1, keepdim=True) / reciprocal.sum(dim=1, keepdim=True).clamp(min=1e-300)
    return (reciprocal * scale).float()


def _generator_of(ids: torch.Tensor, step: int) -> torch.Generator:
    """A generator per response and step, independent of resumes, the number of workers and the order of rows."""
    seed = zlib.crc32(ids.contiguous().numpy().tobytes(), step)
    return torch.Generator().manual_seed(seed)


def _shuffled(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same weights in random order. Tokens that the responses of a group share get different weights."""
    return weights[torch.randperm(len(weights), generator=generator)]


def _random(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Log-normal numbers with the mean and the variance of the response's weights, without clipping.

    With two tokens, mean and variance fix both weights; only their order is random.
    """
    mean, variance = weights.double().mean(), weights.double().var(correction=0)
    if variance == 0 or mean == 0:
        return weights
    normal = torch.randn(len(weights), generator=generator, dtype=torch.float64)
    low, high = -LARGEST_LOG_SPREAD, LARGEST_LOG_SPREAD
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        drawn = mean * len(weights) * torch.softmax(math.exp(middle) * normal, 0)
        # The variance grows with the spread of the normal numbers, at a fixed mean.
        low, high = (middle, high) if drawn.var(correction=0) < variance else (low, middle)
    return drawn.float()


@dataclass(frozen=True)
class Control:
    """What is trained in place of the weights that a signal or the reward function gives."""

    inverts: bool = False
    """Whether importance counts by its reciprocal."""
    draw: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None
    """What becomes of a response's weights (tokens,) at the end."""


CONTROLS = {
    "none": Control(),
    "shuffled": Control(draw=_shuffled),
    "inverse": Control(inverts=True),
    "random": Control(draw=_random),
}
"""By the values of `algorithm.token_weight_control`."""
