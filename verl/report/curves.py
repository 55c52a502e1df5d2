# SPDX-License-Identifier: Apache-2.0
"""A run's metrics over its steps as small charts, each a picture for light and one for dark pages."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from verl.report.numbers import number_text

MOST_POINTS = 400
"""Largest number of points in a line; longer lines are averaged over stretches."""

WIDTH, HEIGHT = 4.6, 2.7
"""Size of a chart, in inches."""

COLOURS = {"light": ("#0b57d0", "#b3541e", "#4d4d57", "#7a3e9d"), "dark": ("#8ab4f8", "#f4a66b", "#c4c4cf", "#c99be0")}
"""Colours of the lines, in order. Blue and orange can be told apart with every kind of colour blindness; the line
styles below work without colour."""

INKS = {"light": ("#16161a", "#d4d4dc"), "dark": ("#f2f2f5", "#44444e")}
"""Colours of texts and of grid lines."""

STYLES = ("-", "--", ":", "-.")

SPEARMAN = "signals/spearman/"


class Line(NamedTuple):
    """A metric and its label in the chart."""

    metric: str
    label: str


class Band(NamedTuple):
    """A shaded area: between two metrics, or mean +- standard deviation."""

    low: str
    high: str
    label: str


@dataclass(frozen=True)
class Panel:
    """A chart, drawn if the run has any of its metrics."""

    title: str
    meaning: str
    """A sentence below the chart."""
    lines: tuple[Line, ...]
    band: Band | None = None
    around: tuple[str, str] | None = None
    """A mean and a standard deviation, in place of a band's two ends."""


PANELS = (
    Panel(
        "Reward",
        "Mean over the responses of a step, and over the held-out prompts.",
        (Line("reward/overall", "training"), Line("val/reward_score", "held-out")),
    ),
    Panel(
        "Accuracy",
        "Share of right answers.",
        (Line("reward/accuracy", "training"), Line("val/accuracy_reward", "held-out")),
    ),
    Panel(
        "Response length",
        "Tokens.",
        (Line("response_length/mean", "training"), Line("val_response_length/mean", "held-out")),
    ),
    Panel("Gradient norm", "Of the policy, before clipping.", (Line("actor/grad_norm", "policy"),)),
    Panel(
        "Token weights",
        "Mean over the response tokens; the band is one standard deviation on both sides.",
        (Line("token_weights/mean", "mean"),),
        around=("token_weights/mean", "token_weights/std"),
    ),
    Panel(
        "What the weights do",
        "Effective sample size as a share of the tokens; shares of tokens at the bounds; the share of the weighted "
        "advantages that cancels between responses which begin alike.",
        (
            Line("token_weights/ess", "effective size"),
            Line("token_weights/clipped_low", "at the lower bound"),
            Line("token_weights/clipped_high", "at the upper bound"),
            Line("token_weights/cancelled_share", "cancelled"),
        ),
    ),
    Panel(
        "VGR",
        "Attention density on the text over the density on the images: median, and 10 % to 90 % of the tokens.",
        (Line("vgr/median", "median"),),
        band=Band("vgr/p10", "vgr/p90", "10 % to 90 %"),
    ),
    Panel(
        "Attention",
        "Shares of a token's attention to the prompt without its first token; the rest lies on special tokens and the "
        "system turn.",
        (Line("attention/vision_mass", "on images"), Line("attention/text_mass", "on text")),
    ),
)

AGREEMENT = "Rank correlation of two signals over the tokens of a response, averaged over responses."


@dataclass(frozen=True)
class Chart:
    """A chart on a page."""

    title: str
    meaning: str
    summary: str
    """The first and last values in words, for screen readers."""
    light: str
    """`data:` URI of the picture."""
    dark: str


class History:
    """The metrics of a run over its steps.

    Args:
        steps: metrics by step.
    """

    def __init__(self, steps: Mapping[int, Mapping[str, float | None]]) -> None:
        self._points: dict[str, list[tuple[int, float]]] = {}
        for step, metrics in sorted(steps.items()):
            for name, value in metrics.items():
                if value is not None and math.isfinite(value):
                    self._points.setdefault(name, []).append((step, value))

    def points(self, metric: str) -> np.ndarray:
        """(points, 2), steps and values; no points if the run has no such metric."""
        return np.array(self._points.get(metric, []), dtype=np.float64).reshape(-1, 2)

    def names(self, prefix: str) -> list[str]:
        """The metrics whose names begin with `prefix`, in order."""
        return sorted(name for name in self._points if name.startswith(prefix))


def charts(history: History) -> list[Chart]:
    """The `PANELS` that have values in this run, and a chart of the agreement of its signals."""
    return [chart for panel in _panels_of(history) if (chart := _chart(panel, history)) is not None]


def _panels_of(history: History) -> Iterator[Panel]:
    yield from PANELS
    pairs = [Line(name, _pair_label(name, history)) for name in history.names(SPEARMAN)]
    for first in range(0, len(pairs), len(STYLES)):
        yield Panel("Agreement of signals", AGREEMENT, tuple(pairs[first : first + len(STYLES)]))


def _pair_label(metric: str, history: History) -> str:
    """The names of the two signals, which may have underscores of their own, as the run logs them one by one."""
    pair = metric.removeprefix(SPEARMAN)
    signals = {name.split("/")[1] for name in history.names("signals/") if name.endswith("/mean")}
    for first in signals:
        second = pair.removeprefix(f"{first}_")
        if second != pair and second in signals:
            return f"{first}, {second}"
    return pair


def _chart(panel: Panel, history: History) -> Chart | None:
    lines = {line.label: points for line in panel.lines if len(points := history.points(line.metric))}
    if not lines:
        return None
    band = _band(panel, history)
    summary = "; ".join(
        f"{label} {number_text(points[0, 1])}" + (f" to {number_text(points[-1, 1])}" if len(points) > 1 else "")
        for label, points in lines.items()
    )
    light, dark = (_drawn(panel, lines, band, mode) for mode in ("light", "dark"))
    return Chart(panel.title, panel.meaning, summary, light, dark)


def _band(panel: Panel, history: History) -> np.ndarray | None:
    """(points, 3), steps and both ends of the band."""
    if panel.around is not None:
        mean, deviation = (history.points(metric) for metric in panel.around)
        steps, mean_places, deviation_places = np.intersect1d(mean[:, 0], deviation[:, 0], return_indices=True)
        middle, width = mean[mean_places, 1], deviation[deviation_places, 1]
        return np.stack([steps, middle - width, middle + width], axis=1)
    if panel.band is not None:
        low, high = history.points(panel.band.low), history.points(panel.band.high)
        steps, low_places, high_places = np.intersect1d(low[:, 0], high[:, 0], return_indices=True)
        return np.stack([steps, low[low_places, 1], high[high_places, 1]], axis=1)
    return None


def _drawn(panel: Panel, lines: Mapping[str, np.ndarray], band: np.ndarray | None, mode: str) -> str:
    import matplotlib  # takes half a second, so only runs with a report import it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ink, grid = INKS[mode]
    # Text stays text, in the reader's font. Without the salt two charts would use the same ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.family": "sans-serif"}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        if band is not None and len(band):
            steps, low, high = _thinned(band).T
            label = panel.band.label if panel.band is not None else None
            axes.fill_between(steps, low, high, color=COLOURS[mode][0], alpha=0.18, linewidth=0, label=label)
        # A line keeps its colour where another of its chart has no numbers.
        for (_, label), colour, style in zip(panel.lines, COLOURS[mode], STYLES, strict=False):
            if label not in lines:
                continue
            points = lines[label]
            steps, values = _thinned(points).T
            marker = "o" if len(points) <= 12 else None
            axes.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=3.5, linewidth=1.6)
        axes.set_xlabel("step", color=ink)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.tick_params(colors=ink, labelsize=8)
        axes.grid(color=grid, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        if len(panel.lines) > 1 or panel.band is not None:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=ink, fontsize=8)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _thinned(points: np.ndarray) -> np.ndarray:
    """Means over stretches of points, at most `MOST_POINTS` of them."""
    if len(points) <= MOST_POINTS:
        return points
    return np.stack([stretch.mean(axis=0) for stretch in np.array_split(points, MOST_POINTS)])
