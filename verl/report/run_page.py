# SPDX-License-Identifier: Apache-2.0
"""The report page of a run: curves, statistics of the token weights, and sample responses token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.report.curves import History, charts
from verl.report.token_map import TokenMap, colour_scale, page_samples, render


@dataclass(frozen=True)
class SampleSet:
    """Responses of one step."""

    title: str
    samples: Sequence[TokenMap]


def run_page(
    title: str, notes: Sequence[str], history: History, sets: Sequence[SampleSet], bounds: tuple[float, float]
) -> str:
    """The page, below 5 MB for 32 samples with pictures of `picture_uris`.

    Args:
        title: the run's name.
        notes: sentences below the title.
        history: the run's metrics.
        sets: in page order.
        bounds: lowest and highest weight of the colour scale.
    """
    samples = iter(page_samples([sample for one in sets for sample in one.samples], bounds))
    return render(
        "run_page.html",
        title=title,
        notes=notes,
        charts=charts(history),
        sets=[(one.title, [next(samples) for _ in one.samples]) for one in sets],
        scale=colour_scale(bounds),
    )
