# SPDX-License-Identifier: Apache-2.0
"""How long a run takes to its first step, and what each of its processes pays for its imports.

    bash scripts/quickstart.sh trainer.max_steps=1                    # makes the data, once
    python scripts/bench_startup.py
    python scripts/bench_startup.py --against ../another_checkout     # two trees side by side

The run is the quickstart's, with its validation before the first step. Its wall time is taken twice: until the first
step begins and until it ends. Imports are taken in CPU seconds, in a fresh process each. Trees take turns, and medians
of all turns are shown. Bytecode is there already, as it is from the second start of an installation on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.02

LEAN = """
import importlib
try:
    from verl.utils.lean_imports import import_modules
except ImportError:  # an older tree
    def import_modules(names):
        for name in names:
            importlib.import_module(name)
"""
IMPORTS = {
    "command line": "import verl.trainer.main",
    "trainer": LEAN + "import_modules(['verl.data.loader', 'verl.trainer.ray_trainer'])",
    "worker": LEAN + "import_modules(['verl.workers.fsdp_workers'])",
    "reward process": "import ray\n"
    "try:\n    import verl.workers.reward.user_function\n"
    "except ImportError:\n    import verl.workers.reward.function",
}
"""What each process of a run executes first; the last one is a Ray worker before anything else."""

RUNS = ("first step begins", "first step ends")


def environment(tree: Path) -> dict[str, str]:
    variables = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    return {**os.environ, **variables}


def import_seconds(tree: Path, code: str) -> float:
    """CPU seconds of a Python that runs `code`, its own start included."""
    clock = "\nimport os, sys\nsys.stdout.write(str(sum(os.times()[:2])))"
    command = [sys.executable, "-c", code + clock]
    return float(subprocess.run(command, env=environment(tree), cwd=tree, capture_output=True, check=True).stdout)


def run_seconds(tree: Path, data: Path) -> dict[str, float]:
    """Wall seconds from the command until the log has the validation before the first step, and the first step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "verl.trainer.main", "config=examples/quickstart.yaml"),
            *(f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet"),
            f"worker.actor.model.model_path={data}/model",
            *("trainer.max_steps=1", "trainer.logger=[file]", f"trainer.save_checkpoint_path={folder}"),
        ]
        log = Path(folder) / "experiment_log.jsonl"
        start = time.perf_counter()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=environment(tree), cwd=tree, **quiet) as run:
            seconds = []
            while run.poll() is None and len(seconds) < len(RUNS):
                lines = log.read_text().count("\n") if log.exists() else 0
                seconds += [time.perf_counter() - start] * (min(lines, len(RUNS)) - len(seconds))
                time.sleep(POLL_SECONDS)
            if run.wait() != 0 or len(seconds) < len(RUNS):
                raise RuntimeError(f"the run in {tree} ended with status {run.returncode}: {' '.join(command)}")
    return dict(zip(RUNS, seconds, strict=True))


def measure(trees: list[Path], data: Path, repeats: int) -> dict[Path, dict[str, list[float]]]:
    """Every figure of every tree, one for each turn; the first turn, in which bytecode may be written, is left out."""
    figures: dict[Path, dict[str, list[float]]] = {tree: {} for tree in trees}
    for turn in range(repeats + 1):
        for tree in trees:
            taken = {name: import_seconds(tree, code) for name, code in IMPORTS.items()} | run_seconds(tree, data)
            if turn > 0:
                for name, value in taken.items():
                    figures[tree].setdefault(name, []).append(value)
            print(json.dumps({"tree": str(tree), "turn": turn, **taken}), file=sys.stderr, flush=True)
    return figures


def table(figures: dict[Path, dict[str, list[float]]]) -> str:
    trees = list(figures)
    titles = ["", *(str(tree) for tree in trees), *(["ratio"] if len(trees) > 1 else [])]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in (*IMPORTS, *RUNS):
        medians = [statistics.median(figures[tree][name]) for tree in trees]
        label = name if name in RUNS else f"{name}, CPU seconds to import"
        cells = [label, *(f"{value:.2f} s" for value in medians)]
        if len(trees) > 1:
            cells.append(f"{medians[0] / medians[1]:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/quickstart/seed_0", help="what the quickstart made")
    parser.add_argument("--against", type=Path, help="another checkout; ratios are this one over it")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not (args.data / "train.parquet").is_file():
        raise SystemExit(
            f"{args.data} has no train.parquet; bash scripts/quickstart.sh makes it, or name it with --data"
        )
    trees = [ROOT, *([args.against.resolve()] if args.against else [])]
    print(table(measure(trees, args.data.resolve(), args.repeats)))


if __name__ == "__main__":
    main()
