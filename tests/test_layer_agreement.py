# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_layer_agreement.py
"""Layers are compared by hand-counted rank correlations, and none gains by having been picked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from verl.report import layer_agreement
from verl.report.layer_agreement import FEW_RESPONSES, MeasuredResponse, compare_layers, rank_correlation

GAIN = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
SLIGHT, AGAINST = (4, 1, 2, 5, 3), (2, 4, 5, 1, 3)
"""Ranks whose squared distances from 1, 2, 3, 4, 5 add up to 16 and to 22: correlations of 0.2 and -0.1."""


def response(*ranks_by_layer: Sequence[float], gain: np.ndarray = GAIN) -> MeasuredResponse:
    """A layer for each list: the higher a token's rank, the more of its attention is on the image."""
    vision = np.array(ranks_by_layer, dtype=np.float32) / 100
    return MeasuredResponse(tuple(range(len(ranks_by_layer))), np.stack([1 - vision, vision], axis=-1), (4, 4), gain)


def test_rank_correlations_are_spearmans() -> None:
    assert rank_correlation(np.array([2, 1, 4, 3, 5]), GAIN) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert rank_correlation(np.exp(10 * GAIN), GAIN) == pytest.approx(1)
    assert rank_correlation(-GAIN, GAIN) == pytest.approx(-1)
    ties = rank_correlation(np.array([1, 1, 2, 2, 2]), GAIN)  # ranks 1.5, 1.5, 4, 4, 4
    assert ties == pytest.approx(7.5 / np.sqrt(7.5 * 10))


def test_where_there_is_nothing_to_rank_there_is_no_correlation() -> None:
    assert np.isnan(rank_correlation(np.ones(5), GAIN))
    assert np.isnan(rank_correlation(GAIN[:4], GAIN[:4]))
    assert np.isnan(rank_correlation(np.array([np.nan, 2, 3, 4, 5]), GAIN))
    assert rank_correlation(np.array([np.nan, 2, 3, 4, 5, 6]), np.arange(6)) == pytest.approx(1)


def test_importance_is_one_over_the_vgr_of_the_layers_mean_masses() -> None:
    one = response((10, 20, 30, 40, 50), (30, 20, 10, 0, 10))
    vision = np.array([20, 20, 20, 20, 30]) / 100
    assert one.importance([0, 1]) == pytest.approx(vision / (1 - vision), rel=1e-4)


def test_a_layer_that_agrees_is_told_from_one_that_does_not() -> None:
    report = compare_layers([response((1, 2, 3, 4, 5), (5, 4, 3, 2, 1), SLIGHT)] * 3)
    assert [one.mean for one in report.by_layer] == pytest.approx([1, -1, 0.2])
    assert (report.num_responses, report.num_tokens) == (3, 15)
    assert [choice.name for choice in report.choices] == ["all", "middle", "last:4"]
    assert report.choices[1].mean == pytest.approx(-1)


def test_what_layers_were_picked_by_does_not_judge_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 has 1, -0.1 and -0.1: the highest mean of all, but not without the first response."""
    monkeypatch.setattr(layer_agreement, "NUM_BEST", 1)
    lucky = [response(GAIN, SLIGHT), response(AGAINST, SLIGHT), response(AGAINST, SLIGHT)]
    best = compare_layers(lucky).choices[-1]
    assert (best.name, best.layers) == ("best", (0,))
    assert best.correlations == pytest.approx([0.2, -0.1, -0.1])


def test_the_advice_names_the_choice_and_what_it_rests_on() -> None:
    layers = [(5, 1, 4, 2, 3)] * 2 + [(1, 2, 3, 4, 5)] * 4
    few = compare_layers([response(*layers)] * 3)
    assert "token_weight_layers=middle" in few.advice[0] and few.advice[-1].endswith("too few to rely on.")
    many = compare_layers([response(*layers)] * FEW_RESPONSES)
    assert many.advice[-1] == f"This rests on {5 * FEW_RESPONSES} tokens of {FEW_RESPONSES} responses."
    assert compare_layers([response(*layers)]).advice[-1].startswith("This rests on 5 tokens of 1 response:")
    against = compare_layers([response((5, 4, 3, 2, 1), (5, 4, 3, 1, 2))] * 3)
    assert against.advice[0].startswith("No layers are recommended")


def test_responses_without_images_are_not_counted() -> None:
    blind = MeasuredResponse((0,), np.ones((1, 5, 2), dtype=np.float32), (4, 0), np.zeros(5))
    report = compare_layers([blind, response((1, 2, 3, 4, 5))])
    assert (report.num_responses, report.num_tokens) == (1, 5)
    assert compare_layers([blind]).advice[0].startswith("No layers are recommended: no response has an image")
