# SPDX-License-Identifier: Apache-2.0
"""Which layers' attention says of a token what the image does for it: rank correlations, and a recommendation.

What the image does for a token is the log-probability that it loses when the image is blanked. What a layer says is
the token's importance by VGR, measured in this layer alone.

Shapes: T response tokens, L measured layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verl.algorithms.token_weights import inverse_vgr
from verl.models.attention_recorder import choose_layers

FEWEST_TOKENS = 5
"""Of a response that is counted: the rank correlation of fewer is noise."""

FEW_RESPONSES = 20
"""Below so many a recommendation comes with a warning."""

NUM_BEST = 4
"""Layers of the choice that takes those which agree best one by one."""


@dataclass(frozen=True)
class MeasuredResponse:
    """One response."""

    layers: tuple[int, ...]
    """Numbers of the L layers."""
    masses: np.ndarray
    """(L, T, 2), each layer's attention on text and on images."""
    keys: tuple[int, int]
    """How many tokens the two have."""
    image_gain: np.ndarray
    """(T,), log-probability with the image less that without, in nats."""

    def importance(self, layers: Sequence[int]) -> np.ndarray:
        """(T,), 1 / VGR from the mean of the layers' masses, as training takes it; NaN where it is undefined."""
        own = self.masses[[self.layers.index(layer) for layer in layers]].mean(axis=0)
        return inverse_vgr(torch.from_numpy(own)[None], torch.tensor([self.keys]))[0].numpy()


@dataclass(frozen=True)
class Agreement:
    """How a choice of layers agrees with the gain, over responses."""

    name: str
    layers: tuple[int, ...]
    correlations: np.ndarray
    """Of each response; NaN where it has too few tokens, or one of the two is constant or undefined."""

    @property
    def mean(self) -> float:
        """Over the responses that have one; NaN if none has."""
        known = self.correlations[np.isfinite(self.correlations)]
        return float(known.mean()) if known.size else float("nan")

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN for less than two responses."""
        return _standard_error(self.correlations)


@dataclass(frozen=True)
class LayerReport:
    """The agreement of each layer and of some choices, and what follows."""

    by_layer: list[Agreement]
    choices: list[Agreement]
    num_responses: int
    """That were counted."""
    num_tokens: int
    """Of them."""
    advice: list[str]
    """Sentences."""


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, over the places where both are finite; NaN for fewer than `FEWEST_TOKENS`, or without any spread."""
    import pandas as pd  # comes with datasets; only who asks for ranks waits for it

    is_known = np.isfinite(one) & np.isfinite(other)
    if is_known.sum() < FEWEST_TOKENS:
        return float("nan")
    ranks = pd.DataFrame({"one": one[is_known], "other": other[is_known]}).rank()
    return float(ranks.corr().loc["one", "other"])


def compare_layers(responses: Sequence[MeasuredResponse]) -> LayerReport:
    """Measures every layer and the usual choices, and recommends the choice that agrees best.

    `best` takes the layers that agree best one by one. Each response is judged by layers that were chosen without it,
    so that the choice has no advantage over those which were not chosen at all; it needs three responses.

    Args:
        responses: of the same layers.
    """
    assert responses, "no response to compare layers by"
    layers = responses[0].layers
    by_layer = [_agreement(f"layer {layer}", [layer], responses) for layer in layers]
    named = {choice: tuple(choose_layers(layers, choice)) for choice in ("all", "middle", "last:4")}
    choices = [_agreement(name, own, responses) for name, own in named.items()]
    table = np.stack([one.correlations for one in by_layer])  # (L, responses)
    is_counted = np.isfinite(table).any(axis=0)  # (responses,)
    if is_counted.sum() > 2 and len(layers) > NUM_BEST:
        choices.append(_best_layers(table, layers, responses))
    num_tokens = sum(len(one.image_gain) for one, counts in zip(responses, is_counted, strict=True) if counts)
    advice = _advise(choices, int(is_counted.sum()), num_tokens)
    return LayerReport(by_layer, choices, int(is_counted.sum()), num_tokens, advice)


def _agreement(name: str, layers: Sequence[int], responses: Sequence[MeasuredResponse]) -> Agreement:
    correlations = [rank_correlation(response.importance(layers), response.image_gain) for response in responses]
    return Agreement(name, tuple(layers), np.array(correlations))


def _best_layers(table: np.ndarray, layers: Sequence[int], responses: Sequence[MeasuredResponse]) -> Agreement:
    held_out = []
    for place, response in enumerate(responses):
        chosen = _highest(np.delete(table, place, axis=1), layers)
        held_out.append(rank_correlation(response.importance(chosen), response.image_gain))
    return Agreement("best", tuple(_highest(table, layers)), np.array(held_out))


def _highest(table: np.ndarray, layers: Sequence[int]) -> list[int]:
    """The layers with the highest means over the columns, ascending."""
    is_known = np.isfinite(table)
    counts = is_known.sum(axis=1)
    means = np.where(counts > 0, np.where(is_known, table, 0).sum(axis=1) / np.maximum(counts, 1), -np.inf)
    return sorted(layers[place] for place in np.argsort(-means, kind="stable")[:NUM_BEST])


def _advise(choices: Sequence[Agreement], num_responses: int, num_tokens: int) -> list[str]:
    known = [choice for choice in choices if np.isfinite(choice.mean)]
    if not known:
        return [
            f"No layers are recommended: no response has an image and {FEWEST_TOKENS} tokens of which the image "
            "changes the probability."
        ]
    basis = f"This rests on {num_tokens:,} tokens of {num_responses:,} responses"
    basis += ": too few to rely on." if num_responses < FEW_RESPONSES else "."
    best, default = max(known, key=lambda choice: choice.mean), choices[0]
    if best.mean <= 0:
        return [
            f"No layers are recommended: in none of the choices do the tokens that attend to the image depend on it "
            f"more than others (the highest mean rank correlation is {best.mean:+.3f}, of {best.name}).",
            basis,
        ]
    value = best.name if best.name != "best" else f"[{','.join(map(str, best.layers))}]"
    told = [f"Recommended: algorithm.token_weight_layers={value}, with a mean rank correlation of {_told(best)}."]
    if best is not default:
        gain = best.correlations - default.correlations
        gain_mean, error = float(np.nanmean(gain)), _standard_error(gain)
        if np.isfinite(error):
            is_clear = gain_mean > 2 * error and num_responses >= FEW_RESPONSES
            told.append(
                f"That is {gain_mean:+.3f} ± {error:.3f} against all layers, "
                + ("a clear difference." if is_clear else "which may be chance.")
            )
    return [*told, basis]


def _told(agreement: Agreement) -> str:
    error = agreement.standard_error
    return f"{agreement.mean:+.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "")


def _standard_error(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1) / np.sqrt(known.size)) if known.size > 1 else float("nan")
