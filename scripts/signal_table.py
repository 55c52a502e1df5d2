# SPDX-License-Identifier: Apache-2.0
"""Evaluates the lines of `scripts/compare_signals.py`: paired differences with intervals, a table, a picture.

Shapes: R pairs of runs, Q held-out questions, B resamples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from verl.utils.writing import write_text

RESAMPLES = 10_000
WINDOW = 5
"""Steps averaged in curves."""
NUM_PARTS = 5
"""Parts of a training in which curves are compared."""


@dataclass(frozen=True)
class Line:
    """The record of a run."""

    task: str
    arm: str
    warm_start: int | str
    seed: int
    model: str
    """SHA-256 of the weights that training began with, or the hub id."""
    questions: str
    """SHA-256 of the held-out file, or the hub id."""
    overrides: list[str]
    """The arm's own."""
    results: np.ndarray
    """(Q,) of the last step, in the held-out set's order."""
    validation: dict[int, float]
    """Held-out mean by step."""
    curves: dict[str, list[float]]
    """Metrics step by step."""
    means: dict[str, float]
    """Metrics, their mean over the steps."""
    seconds: int

    @property
    def key(self) -> tuple[str, int | str, int]:
        """The unique key of the run."""
        return self.arm, self.warm_start, self.seed

    @property
    def before(self) -> float | None:
        """Held-out mean before the first step; None with `trainer.val_before_train=false`."""
        return self.validation.get(0)

    @property
    def accuracy(self) -> float:
        """Held-out mean of the last step."""
        return float(self.results.mean())

    def to_json(self) -> str:
        """One line. Results of 0 and 1 are the hexadecimal digits of their bits, `np.packbits`; others a list."""
        content = asdict(self)
        is_binary = np.isin(self.results, (0, 1)).all()
        content["results"] = (
            np.packbits(self.results.astype(bool)).tobytes().hex() if is_binary else list(self.results)
        )
        content["num_questions"] = len(self.results)
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Line:
        """Reads a line of `to_json`."""
        content: dict[str, Any] = json.loads(text)
        results, num_questions = content.pop("results"), content.pop("num_questions")
        if isinstance(results, str):
            results = np.unpackbits(np.frombuffer(bytes.fromhex(results), np.uint8))[:num_questions]
        content["validation"] = {int(step): value for step, value in content["validation"].items()}
        return cls(results=np.array(results, dtype=float), **content)


def read_lines(path: Path) -> list[Line]:
    """The lines of a file that may not exist.

    Raises:
        ValueError: a line is not the record of a run, or two lines are of the same run.
    """
    if not path.exists():
        return []
    lines: list[Line] = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            lines.append(Line.from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not the record of a run: {error}") from None
    keys = [line.key for line in lines]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{path} has two lines of arm {key[0]}, warm start {key[1]}, seed {key[2]}")
    return lines


def add_line(path: Path, line: Line) -> None:
    """Adds a line to a file that may not exist. A reader sees the file with the whole line, or without it."""
    before = path.read_text("utf-8").rstrip("\n") if path.exists() else ""
    write_text(path, "\n".join(filter(None, [before, line.to_json()])) + "\n")


# ---- differences ----


@dataclass(frozen=True)
class Pairs:
    """Runs of an arm and of the first, from the same model, with the same seed, on the same questions."""

    differences: np.ndarray
    """(R, Q), the arm's result minus the first arm's."""
    warm_starts: list[int | str]
    """The warm start of each pair."""

    @property
    def mean(self) -> float:
        return float(self.differences.mean())

    @property
    def single_seeds(self) -> list[int | str]:
        """Warm starts with one seed, which says nothing about the spread of seeds; they allow no interval."""
        return [one for one in self.warm_starts if self.warm_starts.count(one) == 1]

    def resampled(self) -> np.ndarray:
        """(B,) means of the bootstrap: the deviations of seeds drawn anew and of questions drawn anew add.

        Seeds are drawn within each warm start. Warm starts are not drawn, so intervals hold for these warm starts.
        The same pairs always give the same numbers.

        Few seeds need two corrections. The mean of n drawn seeds has only (n - 1) / n of the variance, so the seeds'
        deviations from their warm start's mean grow by sqrt(n / (n - 1)). And the spread of few seeds is itself
        uncertain, so each resample scales their deviation by sqrt(d / chi^2_d), with d the number of pairs minus the
        number of warm starts. For normal seeds without questions this is Student's t with d degrees of freedom.

        The chance of single answers is in both parts, so intervals are somewhat wide where seeds differ little.
        """
        rng = np.random.default_rng(0)
        of_runs, of_questions = self.differences.mean(axis=1), self.differences.mean(axis=0)  # (R,), (Q,)
        questions, of_seeds = _drawn_means(of_questions, rng), np.zeros(RESAMPLES)  # (B,); the latter are deviations
        for warm_start in dict.fromkeys(self.warm_starts):
            own = of_runs[[one == warm_start for one in self.warm_starts]]  # (seeds,)
            spread = own.mean() + (own - own.mean()) * np.sqrt(len(own) / max(len(own) - 1, 1))
            of_seeds += (_drawn_means(spread, rng) - own.mean()) * len(own) / len(of_runs)
        degrees = max(len(of_runs) - len(set(self.warm_starts)), 1)
        return questions + of_seeds * np.sqrt(degrees / rng.chisquare(degrees, RESAMPLES))


def _drawn_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(B,) means of as many values, drawn with replacement from (n,)."""
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)  # (B, n)
    return counts @ values / len(values)


def interval(resampled: np.ndarray, level: float) -> tuple[float, float]:
    """The percentile interval, e.g. of level 0.95."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_lines(lines: Sequence[Line], arm: str, first: str) -> list[tuple[Line, Line]]:
    """The runs of an arm, each with its partner of the first arm.

    Runs from other models or on other questions are no pair, whatever they are called.
    """

    def what_pairs(line: Line) -> tuple[int | str, ...]:
        return line.warm_start, line.seed, line.model, line.questions

    of_first = {what_pairs(line): line for line in lines if line.arm == first}
    return [(line, of_first[what_pairs(line)]) for line in lines if line.arm == arm and what_pairs(line) in of_first]


def pair(lines: Sequence[Line], arm: str, first: str) -> Pairs:
    """The differences of two arms' results."""
    pairs = paired_lines(lines, arm, first)
    num_questions = len(pairs[0][0].results) if pairs else 0
    differences = np.array([line.results - other.results for line, other in pairs])
    return Pairs(differences.reshape(len(pairs), num_questions), [line.warm_start for line, _ in pairs])


def curve_differences(lines: Sequence[Line], arm: str, first: str, curve: str) -> list[tuple[float, float]]:
    """Where in training two arms part: the paired difference of a curve in each fifth of the steps.

    Args:
        curve: the metric. Curves of unequal length are cut to the shortest.

    Returns:
        For each fifth the mean over the pairs and its standard error, which is NaN for a single pair. Empty where
        there is no pair, or a curve has fewer steps than fifths.
    """
    pairs = [(line.curves[curve], other.curves[curve]) for line, other in paired_lines(lines, arm, first)]
    length = min((len(values) for pair_of_curves in pairs for values in pair_of_curves), default=0)
    if length < NUM_PARTS:
        return []
    differences = np.array([np.subtract(own[:length], other[:length]) for own, other in pairs])  # (R, steps)
    means = [part.mean(axis=1) for part in np.array_split(differences, NUM_PARTS, axis=1)]  # (R,) each
    return [(mean.mean(), mean.std(ddof=1) / len(mean) ** 0.5 if len(mean) > 1 else np.nan) for mean in means]


# ---- what is shown ----


@dataclass(frozen=True)
class Row:
    """An arm in the table; shares of one."""

    arm: str
    accuracies: list[float]
    num_pairs: int
    difference: float | None
    """Mean paired difference from the first arm."""
    plain: tuple[float, float] | None
    """The 95 % interval."""
    corrected: tuple[float, float] | None
    """The same after Bonferroni's correction for the number of arms that are compared with the first."""
    means: dict[str, float]

    @property
    def differs(self) -> bool:
        """Whether the corrected interval leaves out 0."""
        return self.corrected is not None and not self.corrected[0] <= 0 <= self.corrected[1]


def compare(lines: Sequence[Line], arms: Sequence[str]) -> list[Row]:
    """A row for each arm that has runs, the first of `arms` being what the others are compared with."""
    num_comparisons = max(len(arms) - 1, 1)
    rows = []
    for arm in arms:
        of_arm = [line for line in lines if line.arm == arm]
        if not of_arm:
            continue
        difference = plain = corrected = None
        pairs = pair(lines, arm, arms[0])
        if arm != arms[0] and pairs.warm_starts:
            difference = pairs.mean
            if not pairs.single_seeds:
                resampled = pairs.resampled()
                plain, corrected = (interval(resampled, 1 - 0.05 / count) for count in (1, num_comparisons))
        names = dict.fromkeys(name for line in of_arm for name in line.means)
        means = {name: [line.means[name] for line in of_arm if name in line.means] for name in names}
        rows.append(
            Row(
                arm,
                [line.accuracy for line in of_arm],
                len(pairs.warm_starts),
                difference,
                plain,
                corrected,
                {name: float(np.mean(values)) for name, values in means.items()},
            )
        )
    return rows


def remarks(lines: Sequence[Line], arms: Sequence[str]) -> list[str]:
    """Why cells of the table are empty, or an arm has fewer pairs than runs."""
    if all(line.arm != arms[0] for line in lines):
        return [f"no run of {arms[0]} is shown, so nothing is compared with it"]
    told = []
    for arm in arms[1:]:
        num_runs, pairs = sum(line.arm == arm for line in lines), pair(lines, arm, arms[0])
        if len(pairs.warm_starts) < num_runs:
            reason = "no partner with the same warm start, seed, weights and questions"
            told.append(f"{arm}: {num_runs - len(pairs.warm_starts)} of {num_runs} runs have {reason}")
        if pairs.single_seeds:
            of = ", ".join(map(str, pairs.single_seeds))
            told.append(f"{arm}: no interval, since an interval needs two seeds of each warm start ({of} has one)")
    return told


SHOWN_MEANS = {
    "gradient norm": "actor/grad_norm",
    "effective sample size": "token_weights/ess",
    "weight on digits": "token_weights/digit_share",
    "weight on words": "token_weights/word_share",
}


def table(lines: Sequence[Line], arms: Sequence[str], curve: str) -> str:
    """Markdown tables: accuracies and their paired differences in points; what weights did; the metric `curve`, where
    in training arms part."""
    rows = compare(lines, arms)
    header = ["arm", "runs", "accuracy", "sd", "pairs", f"difference from {arms[0]}", "95 % interval", "corrected"]
    body = []
    for row in rows:
        sd = f"{100 * np.std(row.accuracies, ddof=1):.1f}" if len(row.accuracies) > 1 else ""
        accuracy = f"{100 * np.mean(row.accuracies):.1f}"
        cells = [row.arm, len(row.accuracies), accuracy, sd, "", "", "", ""]
        if row.difference is not None:
            mark = " *" if row.differs else ""
            cells[4:] = [
                row.num_pairs,
                f"{100 * row.difference:+.1f}{mark}",
                _points(row.plain),
                _points(row.corrected),
            ]
        body.append(cells)
    measured = {title: name for title, name in SHOWN_MEANS.items() if any(name in row.means for row in rows)}
    agreements = sorted({name for row in rows for name in row.means if name.startswith("signals/spearman/")})
    measured |= {f"rank agreement {name.rpartition('/')[2]}": name for name in agreements if "image_kl" in name}
    means = [[row.arm, *(f"{row.means[n]:.2f}" if n in row.means else "" for n in measured.values())] for row in rows]
    tables = [_markdown(header, body), _markdown(["arm", *measured], means)]
    parts = {row.arm: curve_differences(lines, row.arm, arms[0], curve) for row in rows if row.arm != arms[0]}
    if any(parts.values()):
        fifths = [f"{100 * part // NUM_PARTS} to {100 * (part + 1) // NUM_PARTS} %" for part in range(NUM_PARTS)]
        cells = [[arm, *map(_with_error, differences)] for arm, differences in parts.items() if differences]
        tables.append(_markdown([f"{curve}, from {arms[0]}", *fifths], cells))
    return "\n\n".join(tables)


def _with_error(difference: tuple[float, float]) -> str:
    mean, error = difference
    return f"{100 * mean:+.1f}" + ("" if np.isnan(error) else f" ({100 * error:.1f})")


def _points(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def draw(lines: Sequence[Line], arms: Sequence[str], path: Path, curve: str) -> None:
    """Draw the arms' learning curves, means over runs, and beside them the paired differences with their intervals.

    Args:
        path: `.svg` or `.png`.
        curve: the metric of the learning curves.
    """
    rows = compare(lines, arms)
    figure = Figure(figsize=(10, 4.2), layout="constrained")  # not pyplot, which would look for a display
    left, right = figure.subplots(1, 2)
    for row in rows:
        curves = [line.curves[curve] for line in lines if line.arm == row.arm]
        length = min(map(len, curves))
        window = min(WINDOW, length)
        mean = np.mean([values[:length] for values in curves], axis=0)
        smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
        left.plot(np.arange(window, length + 1), smooth, linewidth=1, label=row.arm)
    left.set(xlabel="step", ylabel=f"{curve}, mean of {WINDOW} steps and all runs")
    left.legend(fontsize=7)
    left.grid(alpha=0.25)
    compared = [row for row in rows if row.difference is not None]
    for place, row in enumerate(compared):
        right.plot(100 * row.difference, place, "o", color="tab:blue")
        for bounds, width in ((row.corrected, 1), (row.plain, 3)):
            if bounds is not None:
                right.plot(100 * np.array(bounds), [place, place], color="tab:blue", linewidth=width)
    right.axvline(0, color="gray", linewidth=1)
    right.set_yticks(range(len(compared)), [row.arm for row in compared])
    right.invert_yaxis()
    right.set(xlabel=f"held-out accuracy, points from {arms[0]}\n95 %; thin: corrected for {len(arms) - 1} arms")
    right.grid(alpha=0.25, axis="x")
    with rc_context({"svg.hashsalt": curve}):  # the same lines make the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
