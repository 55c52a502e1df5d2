# SPDX-License-Identifier: Apache-2.0
"""Tells what a quickstart run learned: `python scripts/report_quickstart.py RUN_FOLDER`.

Draws RUN_FOLDER/learning_curve.png from the run's log, answers the held-out questions with the model before and after
(greedily, outside the trainer), also without the right image, and prints both as one table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from digits_task import generate_answers, score_answers
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

WINDOW = 5  # steps averaged in the curve and in the table's rewards


def read_log(run: Path) -> dict[int, dict[str, Any]]:
    """Read `experiment_log.jsonl`: step -> its metrics, nested as in the file.

    A step may have several lines (validation before training has its own); later ones add to earlier ones.
    """
    metrics: dict[int, dict[str, Any]] = {}
    for line in (run / "experiment_log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        metrics.setdefault(record.pop("step"), {}).update(record)
    return dict(sorted(metrics.items()))


def rewards_of(log: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Training reward by step: the mean over the step's sampled responses."""
    return {step: metrics["reward"]["overall"] for step, metrics in log.items() if "reward" in metrics}


def accuracies_of(log: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Held-out accuracy by step, where there was a validation."""
    return {step: metrics["val"]["accuracy_reward"] for step, metrics in log.items() if "val" in metrics}


def draw_learning_curve(log: dict[int, dict[str, Any]], path: Path) -> None:
    """Draw training reward (every step and a running mean) and held-out accuracy with its first and last level."""
    rewards, accuracies = rewards_of(log), accuracies_of(log)
    steps, values = list(rewards), list(rewards.values())
    running = [sum(values[max(0, i + 1 - WINDOW) : i + 1]) / min(WINDOW, i + 1) for i in range(len(values))]
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")  # not pyplot, which would look for a display
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, running, color="tab:blue", label=f"training reward, mean of {WINDOW} steps")
    levels = list(accuracies.values())
    axes.plot(list(accuracies), levels, "o-", color="tab:orange", label="held-out accuracy (greedy)")
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


def load_checkpoint(actor: Path) -> PreTrainedModel:
    """Load the model of a checkpoint's `actor` folder, from the files of however many workers wrote it last."""
    newest = max(actor.glob("model_world_size_*_rank_0.pt"), key=lambda file: file.stat().st_mtime)
    world_size = int(newest.stem.split("_")[3])
    files = [actor / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
    shards = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    if len(shards) == 1:
        state = shards[0]
    else:  # sharded along the first dimension, and a worker whose turn never comes holds no rows
        state = {name: torch.cat([shard[name].to_local() for shard in shards]) for name in shards[0]}
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.from_pretrained(actor / "huggingface"), dtype=torch.float32
    )
    model.load_state_dict(state)
    return model


def control_accuracies(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image], answers: list[str], prompt: str
) -> dict[str, float]:
    """Accuracy with each row's own image, with a blank one and with another row's.

    Greedy answers depend on the picture alone (the question never changes), so the blank picture is answered once,
    and the answers to other rows' pictures are the answers to the own ones, moved on by one row.
    """
    own = generate_answers(model, processor, images, prompt)
    blank = generate_answers(model, processor, [Image.new("RGB", images[0].size, "white")], prompt) * len(images)
    others = own[1:] + own[:1]
    by_name = {"its own image": own, "a blank image": blank, "another row's image": others}
    return {name: score_answers(given, answers)["accuracy"] for name, given in by_name.items()}


def table(rows: Sequence[tuple[str, float, float]]) -> str:
    """Lay out (name, before, after) rows; accuracies and rewards alike are shares of one."""
    lines = [f"{'':44}{'before':>8}{'after':>8}"]
    lines += [f"{name:44}{before:8.3f}{after:8.3f}" for name, before, after in rows]
    return "\n".join(lines)


def main(run: Path) -> None:
    """Draw the curve of the run in `run`, check its model against the held-out set and print the summary."""
    log = read_log(run)
    picture = run / "learning_curve.png"
    draw_learning_curve(log, picture)

    config = json.loads((run / "experiment_config.json").read_text(encoding="utf-8"))
    checkpoint = run / f"global_step_{max(log)}"
    start = config["worker"]["actor"]["model"]["model_path"]
    rows = datasets.load_dataset("parquet", data_files=config["data"]["val_files"], split="train")
    images, answers, prompt = [row[0] for row in rows["images"]], list(rows["answer"]), rows[0]["prompt"]
    before, after = (
        control_accuracies(model, AutoProcessor.from_pretrained(folder), images, answers, prompt)
        for model, folder in (
            (AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32), start),
            (load_checkpoint(checkpoint / "actor"), checkpoint / "actor" / "huggingface"),
        )
    )
    rewards, accuracies = list(rewards_of(log).values()), list(accuracies_of(log).values())
    ends = [values[:WINDOW] for values in (rewards, rewards[::-1])]
    print(f"\n{max(log)} steps of GRPO, {len(answers)} held-out sums by other writers\n")
    print(
        table(
            [
                (f"training reward (first, last {WINDOW} steps)", *(sum(values) / len(values) for values in ends)),
                ("held-out accuracy, by the trainer", accuracies[0], accuracies[-1]),
                *((f"held-out accuracy with {name}", before[name], after[name]) for name in before),
            ]
        )
    )
    tensorboard = f"tensorboard --logdir tensorboard_log/{config['trainer']['project_name']}"
    print(f"\nlearning curve  {picture}\nlog             {run / 'experiment_log.jsonl'}  ({tensorboard})")
    print(f"checkpoint      {checkpoint}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="trainer.save_checkpoint_path of the run")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    main(parser.parse_args().run)
