# SPDX-License-Identifier: Apache-2.0
"""Compares each layer's attention with the image's effect on tokens: rank correlations, and a recommendation.

The image's effect on a token is the log-probability that the token loses when the image is blanked. It is compared
with the token's importance by VGR, measured in one layer alone.

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
"""Fewest tokens of a response that counts: rank correlations of fewer are noise."""

FEW_RESPONSES = 20
"""With fewer responses, the recommendation comes with a warning."""

NUM_BEST = 4
"""Number of layers in the choice `best`."""


@dataclass(frozen=True)
class MeasuredResponse:
    """One response."""

    layers: tuple[int, ...]
    """The numbers of the L layers."""
    masses: np.ndarray
    """(L, T, 2), each layer's attention on text and on images."""
    keys: tuple[int, int]
    """Numbers of text tokens and image tokens."""
    image_gain: np.ndarray
    """(T,), log-probability with the image minus log-probability without it, in nats."""

    def importance(self, layers: Sequence[int]) -> np.ndarray:
        """(T,), 1 / VGR from the mean of the layers' masses, as in training; NaN where undefined."""
        own = self.masses[[self.layers.index(layer) for layer in layers]].mean(axis=0)
        return inverse_vgr(torch.from_numpy(own)[None], torch.tensor([self.keys]))[0].numpy()


@dataclass(frozen=True)
class Agreement:
    """Agreement of a choice of layers with the image's effect, over responses."""

    name: str
    layers: tuple[int, ...]
    correlations: np.ndarray
    """Rank correlation of each response; NaN if it has too few tokens, or if a side is constant or undefined."""

    @property
    def mean(self) -> float:
        """The mean over responses with a correlation; NaN if there are none."""
        known = self.correlations[np.isfinite(self.correlations)]
        return float(known.mean()) if known.size else float("nan")

    @property
    def standard_error(self) -> float:
        """The standard error of the mean; NaN for fewer than two responses."""
        return _standard_error(self.correlations)


@dataclass(frozen=True)
class LayerReport:
    """The agreement of each layer and of some choices of layers, and the recommendation."""

    by_layer: list[Agreement]
    choices: list[Agreement]
    num_responses: int
    """Number of responses that count."""
    num_tokens: int
    """Number of their tokens."""
    advice: list[str]
    """The recommendation, as sentences."""


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation where both are finite; NaN for fewer than `FEWEST_TOKENS` values or a constant side."""
    import pandas as pd  # comes with datasets; slow to import, so imported only here

    is_known = np.isfinite(one) & np.isfinite(other)
    if is_known.sum() < FEWEST_TOKENS:
        return float("nan")
    ranks = pd.DataFrame({"one": one[is_known], "other": other[is_known]}).rank()
    return float(ranks.corr().loc["one", "other"])


def compare_layers(responses: Sequence[MeasuredResponse]) -> LayerReport:
    """Measures every layer and the usual choices, and recommends the choice that agrees best.

    `best` consists of the layers with the highest single agreement. Each response is judged by layers that were chosen
    without it, which keeps the comparison with fixed choices fair; this needs three responses.

    Args:
        responses: all measured in the same layers.
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
            f"No layers are recommended: no response has an image and {FEWEST_TOKENS} tokens whose probability the "
            "image changes."
        ]
    basis = f"This rests on {num_tokens:,} tokens of {num_responses:,} response{'s' if num_responses != 1 else ''}"
    basis += ": too few to rely on." if num_responses < FEW_RESPONSES else "."
    best, default = max(known, key=lambda choice: choice.mean), choices[0]
    if best.mean <= 0:
        return [
            f"No layers are recommended: in none of the choices do the tokens that attend to the image depend on it "
            f"more than others (the highest mean rank correlation is {best.mean:+.3f}, of {best.name}).",
            basis,
        ]
    value = best.name if best.name != "best" else f"[{','.join(map(str, best.layers))}]"
    sentences = [f"Recommended: algorithm.token_weight_layers={value}, with a mean rank correlation of {_text(best)}."]
    if best is not default:
        gain = best.correlations - default.correlations
        gain_mean, error = float(np.nanmean(gain)), _standard_error(gain)
        if np.isfinite(error):
            is_clear = gain_mean > 2 * error and num_responses >= FEW_RESPONSES
            sentences.append(
                f"That is {gain_mean:+.3f} ± {error:.3f} against all layers, "
                + ("a clear difference." if is_clear else "which may be chance.")
            )
    return [*sentences, basis]


def _text(agreement: Agreement) -> str:
    error = agreement.standard_error
    return f"{agreement.mean:+.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "")


def _standard_error(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.std(ddof=1) / np.sqrt(known.size)) if known.size > 1 else float("nan")
