# SPDX-License-Identifier: Apache-2.0
"""Current and peak memory of this process, read from Linux, for the benchmarks."""

from __future__ import annotations

from pathlib import Path


def status_of_process(field: str) -> float:
    """A line of /proc/self/status in MiB: VmRSS is what is resident now, VmHWM the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}; peaks on a CPU need Linux")


def forget_peak() -> None:
    """Sets VmHWM back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
