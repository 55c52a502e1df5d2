# SPDX-License-Identifier: Apache-2.0
"""Fast imports: hides packages that libraries import only because they are installed."""

import gc
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

UNUSED = ("sklearn", "scipy")
"""transformers imports the first for assisted generation and the second for losses of object detectors.

With pandas, which scikit-learn imports in turn, they take two CPU seconds in every process that has a model.
"""


def import_modules(names: Iterable[str]) -> None:
    """Imports modules inside `lean_imports`."""
    with lean_imports():
        for name in names:
            importlib.import_module(name)


def import_object(path: str) -> Any:
    """The object `module:name`; imports the module if necessary.

    Raises:
        ImportError: the module, or something that it needs, is not installed.
    """
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Inside, the garbage collector ignores the objects that exist now: mostly of modules, a million in all.

    Visiting them takes a tenth of a second each time, most often when a run starts.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def lean_imports() -> Iterator[None]:
    """Inside, the packages in `UNUSED` look as if they were not installed, unless they have been imported already.

    Import modules that import transformers inside, before anything else does. A None in `sys.modules` is Python's own
    way to say that a module does not exist. Afterwards the packages can be imported again, for example by a user's
    reward function or model code. Only transformers checks just once: in this process its object detectors and
    assisted generation report the packages as missing.

    Garbage is not collected inside: imports create none, and the collections take a fifth of the time.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    collects = gc.isenabled()
    sys.modules.update(dict.fromkeys(hidden))
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collects:
            gc.enable()
