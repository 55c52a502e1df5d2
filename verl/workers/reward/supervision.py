# SPDX-License-Identifier: Apache-2.0
"""Starts the supervisor of the reward function's process, and sends messages to it.

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from verl.utils.process_tree import MARK, adopt_orphans, package_environment


@dataclass(frozen=True)
class Limits:
    """Limits of the reward function's process; beyond them its supervisor ends it."""

    grace_s: float = 10.0
    """Seconds after a call's time limit in which the process may still interrupt the call itself."""
    full_share: float = 0.9
    """Share of the machine's memory in use above which it is full. Ray kills processes from 0.95 on."""
    growth_share: float = 0.1
    """A function is to blame if it has grown by this share of the machine's memory since its first batch."""


@dataclass(frozen=True)
class SupervisorArguments:
    """The arguments of a supervisor."""

    pid: int
    """Process id of the supervised process."""
    name: str
    """Its name in messages."""
    mark: str
    """Mark of its process tree."""
    log: str
    """The file for its output."""
    reason_file: str
    """The file for the reason if the supervisor ends it."""
    streams: tuple[int, int]
    """File descriptors from which to read its standard output and standard error."""
    messages: int
    """File descriptor from which to read its messages, one JSON object per line."""
    timeout_s: float | None
    """`worker.reward.timeout_s`."""
    limits: Limits


class Supervision:
    """Starts a supervisor of this process and its descendants; from then on it forwards their output.

    Args:
        name: the name of this process in messages.
        log: the file for its output.
        timeout_s: `worker.reward.timeout_s`.
        limits: limits of time and memory.

    Raises:
        OSError, subprocess.CalledProcessError: the supervisor does not start.
    """

    def __init__(self, name: str, log: str, timeout_s: float | None, limits: Limits) -> None:
        mark = uuid.uuid4().hex
        self.reason_file = os.path.join(tempfile.gettempdir(), f"verl_reward_{mark}")
        outputs, messages = [os.pipe() for _ in range(2)], os.pipe()
        read_ends = (*(read for read, _ in outputs), messages[0])
        arguments = SupervisorArguments(
            os.getpid(), name, mark, log, self.reason_file, read_ends[:2], messages[0], timeout_s, limits
        )
        # The supervisor leaves this process's tree at once, and the command returns; in the tree it would be killed.
        subprocess.run(
            [sys.executable, "-m", "verl.workers.reward.supervisor", json.dumps(asdict(arguments))],
            env=package_environment(),
            cwd="/",
            pass_fds=read_ends,
            start_new_session=True,
            check=True,
        )
        for fd in read_ends:
            os.close(fd)
        for stream, (_, write) in zip((1, 2), outputs, strict=True):
            os.dup2(write, stream)
            os.close(write)
        self._messages = messages[1]
        os.environ[MARK] = mark
        adopt_orphans()

    @contextmanager
    def call(self, samples: str, limit_s: float) -> Iterator[None]:
        """Inside, a call runs that must end within `limit_s` seconds.

        Args:
            samples: describes the call in messages.
        """
        self._send({"call": samples, "limit_s": limit_s})
        try:
            yield
        finally:
            self._send({"call": None, "limit_s": None})

    def settled(self, memory: int) -> None:
        """Reports the memory of the process and its descendants after the first batch, in bytes."""
        self._send({"memory": memory})

    def _send(self, message: dict[str, Any]) -> None:
        os.write(self._messages, json.dumps(message).encode() + b"\n")
