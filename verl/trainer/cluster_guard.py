# SPDX-License-Identifier: Apache-2.0
"""A small process beside a run: it ends the processes of the run's own Ray cluster when the run is gone.

When a driver is killed, Ray's agents outlive it by a minute or more; processes that workers started never end.

    python -m verl.trainer.cluster_guard DRIVER_PID MARK

Its input is one line, the folder of Ray's session. A second, empty line or the end of the input ends the session.
"""

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import psutil

from verl.utils.process_tree import has_variable, package_environment

CLUSTER_MARK = "VERL_CLUSTER"
"""Environment variable that marks every process of a cluster; child processes inherit it."""

KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}
"""Ray changes process titles, which overwrites their environments: https://pypi.org/project/setproctitle."""

LOOKS_PER_SECOND = 2

ATTEMPT_SECONDS = 10
"""Seconds during which killed processes may still have started others."""


class ClusterGuard:
    """The driver's side: a context manager that leaves nothing of the cluster started inside it."""

    def __enter__(self) -> Self:
        self._mark = secrets.token_hex(8)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "verl.trainer.cluster_guard", str(os.getpid()), self._mark],
            env=package_environment(),
            cwd="/",
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C and the end of a terminal are not for it
        )
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):  # it was killed
            self._process.stdin.write("\n")  # closing would not do: what the driver forked holds this end too
            self._process.stdin.close()
        self._process.wait()

    @contextmanager
    def mark_children(self) -> Iterator[None]:
        """Inside, processes that are started belong to the cluster, with all their descendants."""
        variables = {CLUSTER_MARK: self._mark, **KEEP_ENVIRONMENT}
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value

    def remember(self, session_folder: str) -> None:
        """Tells the guard the folder of Ray's session files. After the run only readers of its logs need it."""
        self._process.stdin.write(f"{session_folder}\n")
        self._process.stdin.flush()

    def end_helpers(self) -> None:
        """Ends the Ray processes that need no orderly shutdown; Ray itself would wait a second for each."""
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if process.name() not in ("raylet", "gcs_server") and _has_mark(process, self._mark):
                    process.kill()


def wait_for_end(driver: int) -> str | None:
    """Waits until the driver ends the session, closes the pipe or is gone; returns the session's folder."""
    heard = b""
    while True:
        is_gone = os.getppid() != driver
        if select.select([0], [], [], 0 if is_gone else 1 / LOOKS_PER_SECOND)[0]:
            chunk = os.read(0, 4096)  # not by lines: what Python has read ahead, `select` does not see
            heard += chunk
            if chunk and not heard.startswith(b"\n") and b"\n\n" not in heard:
                continue
        elif not is_gone:  # else a process that it forked holds the other end
            continue
        folder = heard.split(b"\n")[0].decode()
        return folder or None


def end_marked(mark: str) -> None:
    """Kills the processes with this mark, including children that they start meanwhile."""
    deadline = time.monotonic() + ATTEMPT_SECONDS
    while time.monotonic() < deadline:
        processes = [process for process in psutil.process_iter() if _has_mark(process, mark)]
        if not processes:
            return
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=1)


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return has_variable(process, CLUSTER_MARK, mark) and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # gone, or another user's
        return False


def main() -> None:
    """Waits, kills and tidies up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    driver, mark = int(sys.argv[1]), sys.argv[2]
    folder = wait_for_end(driver)
    end_marked(mark)
    if folder is not None:
        for useless in (*Path(folder).glob("ray_spilled_objects*"), Path(folder, "sockets")):
            shutil.rmtree(useless, ignore_errors=True)


if __name__ == "__main__":
    main()
