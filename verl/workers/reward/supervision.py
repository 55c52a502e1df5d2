# SPDX-License-Identifier: Apache-2.0
"""How the reward function's process places itself under a supervisor, and what it tells that one.

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
    """What a supervisor lets the reward function's process have before it ends it."""

    grace_s: float = 10.0
    """Seconds that a call gets beyond its time limit to be interrupted from inside."""
    full_share: float = 0.9
    """A machine is full when this share of its memory is in use. Ray begins to kill processes at 0.95."""
    growth_share: float = 0.1
    """A function that has grown by this share of the machine's memory since its first batch is to blame for that."""


@dataclass(frozen=True)
class Orders:
    """What a supervisor is started with."""

    pid: int
    """Of the process that it supervises."""
    name: str
    """What messages call that one."""
    mark: str
    """Of its tree of processes."""
    log: str
    """The file for what it prints."""
    last_words: str
    """The file for the reason, where the supervisor ends it."""
    streams: tuple[int, int]
    """File descriptors to read: its standard output and its standard error."""
    messages: int
    """File descriptor to read: what it tells the supervisor, one JSON object a line."""
    timeout_s: float | None
    """`worker.reward.timeout_s`."""
    limits: Limits


class Supervision:
    """Starts a supervisor of this process and its descendants; prints go through it from then on.

    Args:
        name: what messages call this process.
        log: the file for what it prints.
        timeout_s: `worker.reward.timeout_s`.
        limits: what it may have.

    Raises:
        OSError, subprocess.CalledProcessError: the supervisor does not start.
    """

    def __init__(self, name: str, log: str, timeout_s: float | None, limits: Limits) -> None:
        mark = uuid.uuid4().hex
        self.last_words = os.path.join(tempfile.gettempdir(), f"verl_reward_{mark}")
        outputs, messages = [os.pipe() for _ in range(2)], os.pipe()
        read_ends = (*(read for read, _ in outputs), messages[0])
        orders = Orders(os.getpid(), name, mark, log, self.last_words, read_ends[:2], messages[0], timeout_s, limits)
        # It leaves this process's tree at once, and the command returns: else it would be ended with the tree.
        subprocess.run(
            [sys.executable, "-m", "verl.workers.reward.supervisor", json.dumps(asdict(orders))],
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
        """Inside, a call runs that has to end within `limit_s` seconds.

        Args:
            samples: what it is about, for messages.
        """
        self._tell({"call": samples, "limit_s": limit_s})
        try:
            yield
        finally:
            self._tell({"call": None, "limit_s": None})

    def settled(self, memory: int) -> None:
        """Says what the process and its descendants hold before they begin to grow, in bytes."""
        self._tell({"memory": memory})

    def _tell(self, message: dict[str, Any]) -> None:
        os.write(self._messages, json.dumps(message).encode() + b"\n")
