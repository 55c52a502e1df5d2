# SPDX-License-Identifier: Apache-2.0
"""Tells what a quickstart run learned: `python scripts/report_quickstart.py RUN`.

Draws RUN/learning_curve.png from the run's log, answers the held-out questions with the model before and after
(greedily, outside the trainer), also without the right image, and prints both as one table. With several runs, and
`--picture FILE`, prints them side by side with their mean and draws them in one picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import torch
import transformers
from matplotlib.figure import Figure
from model_merger import merge
from picture_task import generate_answers, score_answers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from verl.trainer.sinks import FileSink, read_log

Log = dict[int, dict[str, float | None]]
"""Step -> metrics by name."""

WINDOW = 5  # steps averaged in the curve and in the table's rewards


def rewards_of(log: Log) -> dict[int, float]:
    """Training reward by step: the mean over the step's sampled responses."""
    return {step: metrics["reward/overall"] for step, metrics in log.items() if "reward/overall" in metrics}


def accuracies_of(log: Log) -> dict[int, float]:
    """Held-out accuracy by step, where there was a validation."""
    name = "val/accuracy_reward"
    return {step: metrics[name] for step, metrics in log.items() if name in metrics}


def running_means(values: Sequence[float]) -> list[float]:
    """Replace each value by the mean of itself and up to `WINDOW - 1` before it."""
    return [sum(values[max(0, end - WINDOW) : end]) / min(WINDOW, end) for end in range(1, len(values) + 1)]


def mean_over_runs(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """Average curves (step -> value) at the steps that all of them have."""
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}


def draw_learning_curves(logs: Sequence[Log], path: Path) -> None:
    """Draw training reward and held-out accuracy, the mean over runs bold and each run faint, and the two levels.

    The format follows the ending of `path`. A single run shows every step's reward faintly instead.
    """
    rewards, accuracies = [rewards_of(log) for log in logs], [accuracies_of(log) for log in logs]
    smooth = [dict(zip(curve, running_means(list(curve.values())), strict=True)) for curve in rewards]
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")  # not pyplot, which would look for a display
    axes = figure.subplots()
    for curve in rewards if len(logs) == 1 else smooth:
        axes.plot(list(curve), list(curve.values()), color="tab:blue", alpha=0.3, linewidth=1)
    for curve in accuracies if len(logs) > 1 else ():
        axes.plot(list(curve), list(curve.values()), "o-", color="tab:orange", alpha=0.3, linewidth=1, markersize=3)
    over = f", mean of {len(logs)} runs" if len(logs) > 1 else ""
    reward, accuracy = mean_over_runs(smooth), mean_over_runs(accuracies)
    label = f"training reward, mean of {WINDOW} steps{over}"
    axes.plot(list(reward), list(reward.values()), color="tab:blue", label=label)
    levels = list(accuracy.values())
    axes.plot(list(accuracy), levels, "o-", color="tab:orange", label=f"held-out accuracy (greedy){over}")
    for level, name, points in ((levels[0], "before", -4), (levels[-1], "after", 4)):  # below and above their lines
        axes.axhline(level, color="tab:orange", linestyle=":", linewidth=1)
        axes.annotate(
            f"{name} {level:.1%}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, points),
            textcoords="offset points",
            horizontalalignment="right",
            verticalalignment="top" if points < 0 else "bottom",
            color="tab:orange",
            fontsize=9,
        )
    axes.set(xlabel="step", ylim=(0, 1), title="GRPO on sums of handwritten digits by writers it never saw")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def control_accuracies(
    read: Callable[[Sequence[Image.Image], Sequence[str]], list[str]],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    answers: Sequence[str],
) -> dict[str, float]:
    """Accuracy with each row's own image, with a blank one and with another row's.

    `read` returns the model's answers to images and prompts. The question never changes, so greedy answers depend
    only on the picture. So the blank image is answered once, and the answers to other rows' pictures are the answers
    to the rows' own pictures, shifted by one row.
    """
    own = read(images, prompts)
    blank = read([Image.new("RGB", images[0].size, "white")], prompts[:1]) * len(images)
    others = own[1:] + own[:1]
    by_name = {"its own image": own, "a blank image": blank, "another row's image": others}
    return {name: score_answers(given, answers)["accuracy"] for name, given in by_name.items()}


def table(rows: Sequence[tuple[str, float, float]]) -> str:
    """Lay out (name, before, after) rows; accuracies and rewards alike are shares of one."""
    lines = [f"{'':44}{'before':>8}{'after':>8}"]
    lines += [f"{name:44}{before:8.3f}{after:8.3f}" for name, before, after in rows]
    return "\n".join(lines)


def summarize(run: Path) -> list[tuple[str, float, float]]:
    """Return the changes of the run in `run` as (name, before, after), from its log and new answers of its models."""
    log = read_log(run)
    config = json.loads((run / "experiment_config.json").read_text(encoding="utf-8"))
    actor = run / f"global_step_{max(log)}" / "actor"
    start = config["worker"]["actor"]["model"]["model_path"]
    rows = datasets.load_dataset("parquet", data_files=config["data"]["val_files"], split="train")
    images, answers, prompts = [row[0] for row in rows["images"]], list(rows["answer"]), list(rows["prompt"])
    before, after = (
        control_accuracies(
            partial(generate_answers, model, AutoProcessor.from_pretrained(folder)), images, prompts, answers
        )
        for model, folder in (
            (AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32), start),
            (merge(actor, torch.float32), actor / "huggingface"),
        )
    )
    rewards, accuracies = list(rewards_of(log).values()), list(accuracies_of(log).values())
    ends = [values[:WINDOW] for values in (rewards, rewards[::-1])]
    return [
        (f"training reward (first, last {WINDOW} steps)", *(sum(values) / len(values) for values in ends)),
        ("held-out accuracy, by the trainer", accuracies[0], accuracies[-1]),
        *((f"held-out accuracy with {name}", before[name], after[name]) for name in before),
    ]


def describe_token_weights(log: Log) -> str:
    """One line on what VGR weights did, from the means over the steps; empty where they were off."""
    names = ("vgr/median", "token_weights/std", "token_weights/ess")
    steps = [metrics for metrics in log.values() if metrics.keys() >= set(names)]
    if not steps:
        return ""
    vgr, std, ess = (sum(metrics[name] for metrics in steps) / len(steps) for name in names)
    return f"VGR token weights: standard deviation {std:.2f}, effective sample size {ess:.0%}; median VGR {vgr:.2f}"


def compare(runs: Sequence[Path]) -> str:
    """Lay out the runs' figures and their mean as a Markdown table, each cell `before -> after`."""
    summaries = [summarize(run) for run in runs]
    lines = ["| | " + " | ".join(run.name for run in runs) + " | mean |", "|---" * (len(runs) + 2) + "|"]
    for same in zip(*summaries, strict=True):
        mean = [sum(row[column] for row in same) / len(same) for column in (1, 2)]
        cells = [f"{before:.3f} → {after:.3f}" for before, after in [*(row[1:] for row in same), mean]]
        lines.append(f"| {same[0][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(run: Path) -> None:
    """Draw the curve of the run in `run`, check its model against the held-out set and print the summary."""
    log = read_log(run)
    picture = run / "learning_curve.png"
    draw_learning_curves([log], picture)
    print(f"\n{max(log)} steps of GRPO; held-out sums are by other writers\n")
    print(table(summarize(run)))
    print(f"\n{describe_token_weights(log)}")
    config = json.loads((run / "experiment_config.json").read_text(encoding="utf-8"))
    tensorboard = f"tensorboard --logdir tensorboard_log/{config['trainer']['project_name']}"
    print(f"\nlearning curve  {picture}\nlog             {run / 'experiment_log.jsonl'}  ({tensorboard})")
    print(f"checkpoint      {run / f'global_step_{max(log)}'}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="trainer.save_checkpoint_path of a run")
    parser.add_argument("--picture", type=Path, help="where several runs are drawn in one, as .svg or .png")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    arguments = parser.parse_args()
    for run in arguments.runs:
        if not (run / FileSink.LOG).is_file():
            parser.error(
                f"{run} is no folder of a run: it has no {FileSink.LOG}; bash scripts/quickstart.sh makes one"
            )
    if len(arguments.runs) == 1 and arguments.picture is None:
        main(arguments.runs[0])
    else:
        print(compare(arguments.runs))
        if arguments.picture is not None:
            draw_learning_curves([read_log(run) for run in arguments.runs], arguments.picture)
