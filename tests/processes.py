# SPDX-License-Identifier: Apache-2.0
"""Lists living processes, and checks that processes have ended."""

import time
from collections.abc import Collection

import psutil

from verl.utils.process_tree import has_variable


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def are_gone(pids: Collection[int], seconds: float = 10) -> bool:
    """Whether all have ended within that time."""
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def processes_marked(mark: str) -> list[int]:
    """Those that were started with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if has_variable(process, "VERL_TEST_MARK", mark) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found
