# SPDX-License-Identifier: Apache-2.0
"""Memory in use on this machine, or in the container if it has a limit."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")

CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files of limit, use and statistics, and the statistics' name of reclaimable memory; cgroups version 2 and 1."""


def memory_in_use(cgroup: Path = CGROUP) -> tuple[int, int]:
    """Bytes in use, without reclaimable ones, and bytes in all.

    Args:
        cgroup: folder of the container's limits.
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
