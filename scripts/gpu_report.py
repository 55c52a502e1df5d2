# SPDX-License-Identifier: Apache-2.0
"""Reports this machine's GPU and its speed, to interpret the benchmarks' figures."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from verl.models.flops import peak_flops

SIDE = 8192
"""Side of the square matrices that are multiplied."""
COPIED_BYTES = 2**30


def seconds_of(run: Callable[[], object], repeats: int = 5) -> float:
    """Median, after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "transformers": transformers.__version__}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for package in ("flash_attn", "vllm"):
        print(f"{package}: {'installed' if importlib.util.find_spec(package) else 'not installed'}")
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device: its build, or the driver, does not fit")
    device = torch.cuda.get_device_properties(0)
    print(f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.1f} GiB each")
    peak = peak_flops(device.name)
    print("peak in bf16: " + ("not known, so that no MFU is told" if peak is None else f"{peak / 1e12:.0f} TFLOP/s"))
    matrix = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    print(f"product of matrices: {2 * SIDE**3 / seconds_of(lambda: matrix @ matrix) / 1e12:.0f} TFLOP/s")
    for name, host in (
        ("ordinary", torch.empty(COPIED_BYTES, dtype=torch.uint8)),
        ("pinned", torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)),
    ):
        seconds = seconds_of(lambda host=host: host.to("cuda", non_blocking=True))
        print(f"copy from {name} host memory: {COPIED_BYTES / seconds / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
