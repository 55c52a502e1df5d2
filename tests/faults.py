# SPDX-License-Identifier: Apache-2.0
"""Ends a run at a named point: `python -m tests.faults MODULE:FUNCTION CALL [the trainer's arguments]` kills itself.

The hook is here, not in the product: the function of that name is replaced for the life of the process.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from verl.utils.lean_imports import import_object


class Ended(BaseException):
    """In the place of a kill, for runs in the process of the tests."""


def end() -> None:
    raise Ended


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def fault_before(place: str, call: int, fault: Callable[[], None] = end) -> Iterator[None]:
    """Has a function of the package meet a fault instead of being called for the `call`-th time, from 1 on.

    Args:
        place: `module:function` or `module:Class.method`, as the module that calls it knows it.
    """
    module, _, name = place.partition(":")
    owner_name, _, attribute = name.rpartition(".")
    owner = import_object(f"{module}:{owner_name}") if owner_name else import_module(module)
    whole = getattr(owner, attribute)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            fault()
        return whole(*args, **options)

    setattr(owner, attribute, counted)
    try:
        yield
    finally:
        setattr(owner, attribute, whole)
        assert calls >= call, f"{place} was called {calls} times, not {call}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from verl.trainer.main import main

    place, call = sys.argv[1:3]
    del sys.argv[1:3]
    with fault_before(place, int(call), kill):
        main()
