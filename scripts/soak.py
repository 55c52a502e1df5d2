# SPDX-License-Identifier: Apache-2.0
"""Trains through faults and compares the result with a run without faults: `python scripts/soak.py [--steps 300]`.

Two runs of tiny steps on the quickstart's digits. In the second one, there is a fault every `--fault-every` steps: a
worker, the reward function's process or the driver is killed, the disk is full for a while, or the run gets SIGTERM.
If the run does not survive by itself (`trainer.max_restarts`), the script starts it again. In the end weights,
optimizer and log must equal the first run's, and processes, shared memory and temporary files must be as before.
Memory and open files of the processes of the run without faults are printed during the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import make_digits

from verl.utils.safe_load import load_tensors

ROOT = Path(__file__).resolve().parent.parent

MEBIBYTE = 2**20

TEMPORARY = "t"
"""Folder of the runs' temporary files; the names of sockets in it must be short."""

SETTINGS = (
    "data.rollout_batch_size=4",
    "data.max_response_length=8",
    "worker.actor.global_batch_size=2",
    "worker.actor.micro_batch_size_per_device_for_update=4",
    "worker.actor.micro_batch_size_per_device_for_experience=8",
    "worker.rollout.n=2",
    "trainer.val_freq=-1",
    "trainer.val_before_train=false",
    "trainer.logger=[file]",
    "trainer.find_last_checkpoint=true",
    "trainer.save_freq=5",
    "trainer.save_limit=2",
    "trainer.deterministic=true",
)

PATIENCE_SECONDS = 120
"""Seconds within which a run must take its next step, with or without a fault."""


class Failure(Exception):
    """The two runs differ where they must not."""


# ---- a run ----


@dataclass
class Trainer:
    """The trainer's command on its own folder, restarted whenever it ends."""

    data: Path
    folder: Path
    steps: int
    max_restarts: int = 0

    process: subprocess.Popen | None = None
    starts: int = 0

    def start(self) -> None:
        """Starts it, or starts it again."""
        command = [
            *(sys.executable, "-m", "verl.trainer.main", "config=examples/quickstart.yaml", *SETTINGS),
            f"data.train_files={self.data}/train.parquet",
            f"data.val_files={self.data}/val.parquet",
            f"worker.actor.model.model_path={self.data}/model",
            f"trainer.save_checkpoint_path={self.folder}",
            f"trainer.max_steps={self.steps}",
            f"trainer.max_restarts={self.max_restarts}",
        ]
        self.starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder.with_suffix(".txt"), "a") as output:
            temporary = str(self.folder.parent / TEMPORARY)
            environment = {**os.environ, "TMPDIR": temporary, "RAY_TMPDIR": temporary}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

    @property
    def step(self) -> int:
        """The last step in its log."""
        return max((line["step"] for line in log_of(self.folder)), default=0)

    def wait_for(self, step: int) -> None:
        """Waits until it has logged this step."""
        seen, deadline = self.step, time.monotonic() + PATIENCE_SECONDS
        while seen < step:
            if self.process.poll() is not None:
                raise Failure(
                    f"the run ended with code {self.process.returncode} at step {seen}, see {self.folder}.txt"
                )
            if self.step > seen:
                seen, deadline = self.step, time.monotonic() + PATIENCE_SECONDS
            if time.monotonic() > deadline:
                raise Failure(f"no step after {seen} within {PATIENCE_SECONDS} s, see {self.folder}.txt")
            time.sleep(0.05)

    def wait(self) -> int:
        """Waits until it has ended; returns the exit code."""
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def processes(self) -> dict[str, psutil.Process]:
        """The driver, the workers and the reward function's process by name."""
        driver = psutil.Process(self.process.pid)
        found = {"driver": driver}
        for child in driver.children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except psutil.Error:
                continue
            for name in ("WorkerProcess", "FSDPWorker", "RewardProcess"):
                if title.startswith(f"ray::{name}"):
                    found["reward" if name == "RewardProcess" else "worker"] = child
        return found


def log_of(folder: Path) -> list[dict]:
    """The whole lines of a run's log."""
    path = folder / "experiment_log.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


# ---- faults ----


def lose_worker(trainer: Trainer) -> None:
    """The run goes on by itself."""
    trainer.processes()["worker"].kill()


def lose_reward(trainer: Trainer) -> None:
    """The run goes on by itself."""
    trainer.processes()["reward"].kill()


def lose_driver(trainer: Trainer) -> None:
    """It is started again once Ray's processes are gone."""
    left = psutil.Process(trainer.process.pid).children(recursive=True)
    trainer.process.kill()
    trainer.wait()
    _, alive = psutil.wait_procs(left, timeout=10)
    if alive:
        raise Failure(f"10 s after the driver was killed, {len(alive)} of its processes live: {alive[0]}")
    trainer.start()


def fill_disk(trainer: Trainer) -> None:
    """No file can grow beyond 64 KiB until the run has met it in a save and ended; then it is started again."""
    for process in trainer.processes().values():
        process.rlimit(psutil.RLIMIT_FSIZE, (2**16, psutil.RLIM_INFINITY))
    if trainer.wait() == 0:
        raise Failure("a run that could not write its checkpoint ended with code 0")
    trainer.start()


def ask_to_end(trainer: Trainer) -> None:
    """It saves and ends well; then it is started again."""
    trainer.process.send_signal(signal.SIGTERM)
    if (code := trainer.wait()) != 0:
        raise Failure(f"after SIGTERM the run ended with code {code}")
    trainer.start()


FAULTS: dict[str, Callable[[Trainer], None]] = {
    "worker killed": lose_worker,
    "reward process killed": lose_reward,
    "driver killed": lose_driver,
    "disk full": fill_disk,
    "SIGTERM": ask_to_end,
}


# ---- what must be left ----


def require_equal(whole: Path, faulty: Path, steps: int) -> None:
    """Weights, optimizer state and schedule to the last bit, and a log with every step once.

    Raises:
        Failure: naming what differs.
    """
    logged = [line["step"] for line in log_of(faulty) if "actor" in line]
    if logged != list(range(1, steps + 1)):
        raise Failure(f"the log has not every step once: {[step for step in logged if logged.count(step) != 1]}")
    for kind in ("model", "optim", "extra_state"):
        name = f"global_step_{steps}/actor/{kind}_world_size_1_rank_0.pt"
        differing = differences(load_tensors(whole / name), load_tensors(faulty / name))
        if differing:
            raise Failure(f"{len(differing)} parts of {name} differ, such as {differing[0]}")


def differences(left: object, right: object, place: str = "") -> list[str]:
    """The places in which two trees of tensors and values differ."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [found for key in left for found in differences(left[key], right[key], f"{place}/{key}")]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        pairs = zip(left, right, strict=True)
        return [found for index, pair in enumerate(pairs) for found in differences(*pair, f"{place}/{index}")]
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return [] if torch.equal(left, right) else [place]
    is_equal = np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right
    return [] if is_equal else [place]


def leftovers(temporary: Path) -> dict[str, int]:
    """The resources that runs might leave behind on this machine.

    Args:
        temporary: the folder for their temporary files. Ray's logs and torch's compiled code stay there, and empty
            folders of Python's multiprocessing.
    """
    own = [path for path in temporary.iterdir() if path.name != "ray" and not path.name.startswith("torchinductor_")]
    titles = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    shared = [path for path in Path("/dev/shm").rglob("*") if path.is_file()]
    return {
        "processes": sum(str(temporary.parent) in title for title in titles),
        "shared memory, MiB": sum(path.stat().st_size for path in shared) // MEBIBYTE,
        "temporary files": sum(path.is_file() for folder in own for path in (folder, *folder.rglob("*"))),
        "sockets of Ray": sum(1 for _ in temporary.glob("ray/session_*/sockets/*")),
    }


def resources(trainer: Trainer) -> dict[str, str]:
    """Private memory and open files of each process of a run."""
    shown = {}
    for name, process in trainer.processes().items():
        memory = process.memory_info()
        shown[name] = f"{(memory.rss - memory.shared) / MEBIBYTE:.0f} MiB, {process.num_fds()} files"
    return shown


# ---- the soak ----


def make_data(folder: Path, seed: int) -> Path:
    """The quickstart's digits and its model as it is before the warm start; eight held-out rows."""
    if not (folder / "model").exists():
        make_digits.main(folder, seed=seed, steps=0)
        rows = make_digits.datasets.load_dataset("parquet", data_files=str(folder / "test.parquet"), split="train")
        rows.select(range(8)).to_parquet(folder / "val.parquet")
    return folder


def run_without_faults(data: Path, folder: Path, steps: int) -> None:
    """The run to compare with."""
    trainer = Trainer(data, folder, steps)
    trainer.start()
    for step in range(steps // 6, steps, max(steps // 6, 1)):
        trainer.wait_for(step)
        print(
            f"  step {step}:", "; ".join(f"{name} {value}" for name, value in resources(trainer).items()), flush=True
        )
    if (code := trainer.wait()) != 0:
        raise Failure(f"the run without faults ended with code {code}, see {folder}.txt")


def run_with_faults(data: Path, folder: Path, steps: int, fault_every: int) -> None:
    """The run with faults."""
    trainer = Trainer(data, folder, steps, max_restarts=steps)
    trainer.start()
    for step, name in zip(range(fault_every, steps - 3, fault_every), itertools.cycle(FAULTS), strict=False):
        # Between two checkpoints, so that steps are taken again.
        trainer.wait_for(step + 2)
        started = time.monotonic()
        FAULTS[name](trainer)
        trainer.wait_for(step + 4)
        print(f"  step {step + 2}: {name}; at step {step + 4} {time.monotonic() - started:.1f} s later", flush=True)
    if (code := trainer.wait()) != 0:
        raise Failure(f"the run with faults ended with code {code}, see {folder}.txt")
    print(f"  started {trainer.starts} times")


def main(arguments: argparse.Namespace) -> None:
    """Both runs and the comparison.

    Raises:
        Failure: they differ, or something was left.
    """
    with tempfile.TemporaryDirectory(prefix="soak_") as own:
        folder = arguments.folder or Path(own)
        data = make_data(folder / "data", arguments.seed)
        for name in ("whole", "faulty", TEMPORARY):
            shutil.rmtree(folder / name, ignore_errors=True)
        temporary = folder / TEMPORARY
        temporary.mkdir()
        before = leftovers(temporary)
        print(f"{arguments.steps} steps without faults", flush=True)
        run_without_faults(data, folder / "whole", arguments.steps)
        print(f"{arguments.steps} steps with a fault every {arguments.fault_every}", flush=True)
        run_with_faults(data, folder / "faulty", arguments.steps, arguments.fault_every)
        require_equal(folder / "whole", folder / "faulty", arguments.steps)
        print("weights, optimizer and schedule are equal bit for bit; the log has every step once")
        time.sleep(5)  # Ray's agents take a moment to end
        after = leftovers(temporary)
        for name, value in after.items():
            print(f"{name}: {before[name]} before, {value} after")
        more = [name for name, value in after.items() if value > before[name]]
        if more:
            raise Failure(f"left behind: {', '.join(more)}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each run (%(default)s)")
    parser.add_argument("--fault-every", type=int, default=20, help="steps from fault to fault (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a temporary one by default")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        main(parse())
    except Failure as failure:
        sys.exit(f"failed: {failure}")
