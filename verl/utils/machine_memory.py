# SPDX-License-Identifier: Apache-2.0
"""How full this machine's memory is, or the container's where that has a limit of its own."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")

CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Limit, use, details, and in these what the kernel gives back when asked; of cgroups version 2 and 1."""


def memory_in_use(cgroup: Path = CGROUP) -> tuple[int, int]:
    """Bytes in use that no process can be given, and bytes there are.

    Args:
        cgroup: where the container's limits are.
    """
    machine = psutil.virtual_memory()
    for names in CGROUP_FILES:
        *files, reclaimable = names
        limit, use, details = (cgroup / name for name in files)
        if not limit.exists() or not use.exists():
            continue
        total = limit.read_text().strip()
        if total.isdigit() and int(total) < machine.total:
            given_back = dict(line.split() for line in details.read_text().splitlines()).get(reclaimable, 0)
            return int(use.read_text()) - int(given_back), int(total)
    return machine.total - machine.available, machine.total
