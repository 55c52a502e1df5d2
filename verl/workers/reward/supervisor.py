# SPDX-License-Identifier: Apache-2.0
"""A process that supervises the reward function's process on the same machine. The function cannot block it.

It forwards the function's output. It ends the function's process, and writes down the reason, if a call does not end,
if the process is stopped, or if it has filled the machine's memory. When that process is gone for any reason, it ends
all of its descendants, and then itself. `supervision.py` starts it.
"""

from __future__ import annotations

import json
import os
import selectors
import sys
import time
from functools import partial
from pathlib import Path

import psutil

from verl.utils.machine_memory import memory_in_use
from verl.utils.process_tree import ProcessTree
from verl.workers.reward.output_log import Output
from verl.workers.reward.supervision import Limits, SupervisorArguments

LOOK_SECONDS = 0.2
"""Seconds between two checks of the process and the machine's memory."""

SEARCH_SECONDS = 1.0
"""Seconds between two listings of all processes, which take ten milliseconds or more."""

END_SECONDS = 8.0
"""Seconds for killed descendants to end."""

DRAIN_SECONDS = 2.0
"""Seconds to wait for the last output."""

CHUNK = 64 * 2**10
"""Bytes read at a time."""

GIB = 2**30


class Supervisor:
    """Supervises one process until it ends. File descriptors 1 and 2 are the console of that process."""

    def __init__(self, arguments: SupervisorArguments) -> None:
        self._arguments = arguments
        self._root = psutil.Process(arguments.pid)
        self._tree = ProcessTree(self._root, arguments.mark)
        title = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {arguments.pid} on {os.uname().nodename} ---"
        self._output = Output(Path(arguments.log), title)
        self._heard = b""
        self._samples: str | None = None
        self._deadline: float | None = None
        self._first_memory = 0
        self._selector = selectors.DefaultSelector()
        self._stopped_since: float | None = None
        self._was_full = False
        self._next_look = self._next_search = 0.0

    def run(self) -> None:
        """Supervises; returns when the process and all its descendants are gone."""
        with self._selector as selector:
            for console, fd in enumerate(self._arguments.streams, start=1):
                selector.register(fd, selectors.EVENT_READ, partial(self._output.take, console=console))
            selector.register(self._arguments.messages, selectors.EVENT_READ, self._handle_messages)
            while self._lives():
                _pass_on(selector, LOOK_SECONDS)
            self._tree.end_descendants(END_SECONDS)
            end = time.monotonic() + DRAIN_SECONDS
            while _pass_on(selector, 0) and time.monotonic() < end:
                pass
        self._output.close()

    def _handle_messages(self, chunk: bytes) -> None:
        *lines, self._heard = (self._heard + chunk).split(b"\n")
        for message in map(json.loads, lines):
            if "memory" in message:
                self._first_memory = message["memory"]
            else:
                self._samples, limit_s = message["call"], message["limit_s"]
                end = None if limit_s is None else time.monotonic() + limit_s + self._arguments.limits.grace_s
                self._deadline = end

    def _lives(self) -> bool:
        now = time.monotonic()
        if now < self._next_look:
            return True
        self._next_look = now + LOOK_SECONDS
        try:
            status = self._root.status()
            if status == psutil.STATUS_ZOMBIE or not self._root.is_running():
                return False
            self._check_time(now, is_stopped=status == psutil.STATUS_STOPPED)
            self._check_memory(now)
        except psutil.NoSuchProcess:
            return False
        return True

    def _check_time(self, now: float, is_stopped: bool) -> None:
        self._stopped_since = (self._stopped_since or now) if is_stopped else None
        if self._arguments.timeout_s is None:
            return
        deadline = self._deadline
        if deadline is None and is_stopped:  # before the call could start
            deadline = self._stopped_since + self._arguments.timeout_s + self._arguments.limits.grace_s
        if deadline is None or now < deadline:
            return
        limit = f"worker.reward.timeout_s={self._arguments.timeout_s:g}"
        call = "" if self._samples is None else f" in the call for {self._samples}"
        if is_stopped:
            self._end(f"{self._arguments.name} was stopped{call} (SIGSTOP) for longer than {limit} allows")
        else:
            self._end(
                f"{self._arguments.name} took longer than {limit}{call} and could not be interrupted: it stays in "
                "native code, or blocks or replaces SIGALRM"
            )

    def _check_memory(self, now: float) -> None:
        used, total = memory_in_use()
        is_full, is_due = used >= self._arguments.limits.full_share * total, now >= self._next_search
        if is_due:
            self._next_search = now + SEARCH_SECONDS
            self._tree.refresh()
        if is_full and (is_due or not self._was_full):
            self._judge_memory(used, total)
        self._was_full = is_full

    def _judge_memory(self, used: int, total: int) -> None:
        memory = self._tree.memory()
        _pass_on(self._selector, 0)  # measuring takes time; meanwhile the process may have reported its memory
        if memory - self._first_memory >= self._arguments.limits.growth_share * total:
            growth = f"have grown from {self._first_memory / GIB:.1f} to {memory / GIB:.1f} GiB"
            machine = f"{used / GIB:.1f} of the machine's {total / GIB:.1f} GiB are in use"
            remedy = "look for what it keeps from call to call"
            self._end(f"{self._arguments.name} and its children {growth}, and {machine}; {remedy}")

    def _end(self, reason: str) -> None:
        """Writes down the reason and kills the process."""
        path = Path(self._arguments.reason_file)
        if not path.exists():
            path.write_text(reason, encoding="utf-8")
        self._root.kill()


def _pass_on(selector: selectors.BaseSelector, seconds: float) -> bool:
    """Forwards what arrives within `seconds`; returns whether anything arrived."""
    ready = selector.select(seconds)
    for key, _ in ready:
        if chunk := os.read(key.fd, CHUNK):
            key.data(chunk)
        else:
            selector.unregister(key.fd)
    return bool(ready)


def main() -> None:
    """Leaves the process tree of the parent, and supervises the parent."""
    arguments = json.loads(sys.argv[1])
    arguments = SupervisorArguments(**{**arguments, "limits": Limits(**arguments["limits"])})
    supervisor = Supervisor(arguments)
    if os.fork():
        os._exit(0)
    supervisor.run()


if __name__ == "__main__":
    main()
