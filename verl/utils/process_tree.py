# SPDX-License-Identifier: Apache-2.0
"""A process and its descendants: measures their memory, and ends them when the process is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

import verl

MARK = "VERL_PROCESS_TREE"
"""Environment variable that descendants inherit; its value identifies their tree."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Options of prctl(2)."""


def adopt_orphans() -> None:
    """Makes this process the new parent of descendants whose parent ends, so that they stay in its tree.

    Raises:
        OSError: the system refuses.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Makes the system kill this process when its parent ends for any reason.

    Raises:
        OSError: the system refuses.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


class ProcessTree:
    """A process and its descendants.

    When a process dies, its children get another parent, and their origin is lost. So `refresh` remembers the
    descendants that it sees. Others are found by the process group of the root, if it leads one, and by `MARK` in
    their environment. A process escapes if it started after the last `refresh`, has left the group, and has emptied
    its environment or never started a program.

    Args:
        root: the process.
        mark: the value of `MARK` in the environment of the programs that it starts.
    """

    def __init__(self, root: psutil.Process, mark: str) -> None:
        self.root = root
        self._mark = mark
        self._leads_group = os.getpgid(root.pid) == root.pid
        self._seen: set[psutil.Process] = set()

    def refresh(self) -> None:
        """Remembers the current descendants."""
        known = {process for process in self._seen if _is_alive(process)}
        self._seen = known | set(_with_descendants(known | {self.root})) - {self.root}

    def memory(self) -> int:
        """Memory of root and descendants in bytes; shared pages are divided among their users (PSS)."""
        self.refresh()
        return memory_of({self.root, *self._seen})

    def end_descendants(self, seconds: float) -> bool:
        """Kills the descendants, including children that they start meanwhile.

        Args:
            seconds: longest time to wait for their end.

        Returns:
            Whether all are gone.
        """
        deadline = time.monotonic() + seconds
        while remaining := self._descendants():
            if time.monotonic() > deadline:
                return False
            for process in remaining:
                _kill(process)
            time.sleep(0.02)
        return True

    def _descendants(self) -> set[psutil.Process]:
        marked = {process for process in psutil.process_iter() if self._belongs(process)}
        processes = _with_descendants({process for process in self._seen | marked if _is_alive(process)})
        self._seen = {process for process in processes if _is_alive(process)} - {self.root, psutil.Process()}
        return self._seen

    def _belongs(self, process: psutil.Process) -> bool:
        try:
            in_group = self._leads_group and os.getpgid(process.pid) == self.root.pid
            return in_group or has_variable(process, MARK, self._mark)
        except (psutil.Error, OSError):
            return False


def has_variable(process: psutil.Process, name: str, value: str) -> bool:
    """Whether a process was started with this variable in its environment.

    psutil's own reader stops at the gap that a changed process title leaves; Ray's processes change theirs.

    Raises:
        OSError: the process is gone, or belongs to another user.
    """
    variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    return f"{name}={value}".encode() in variables


def package_environment() -> dict[str, str]:
    """Environment for a process that runs a module of this package from any folder."""
    paths = (str(Path(verl.__file__).parent.parent), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def memory_of(processes: Iterable[psutil.Process]) -> int:
    """Memory of processes in bytes; shared pages are divided among their users (PSS). Ended processes count 0."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _with_descendants(processes: set[psutil.Process]) -> set[psutil.Process]:
    """The processes and their descendants, from one listing of all processes."""
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        try:
            children.setdefault(process.ppid(), []).append(process)
        except psutil.Error:
            continue
    return set(_walk(processes, children))


def _walk(processes: Iterable[psutil.Process], children: dict[int, list[psutil.Process]]) -> Iterator[psutil.Process]:
    pending = list(processes)
    while pending:
        process = pending.pop()
        yield process
        pending.extend(children.pop(process.pid, ()))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        pass  # it is gone, or another user's
