# SPDX-License-Identifier: Apache-2.0
"""Functions that a user names as `path.py:function` in the configuration.

It loads neither torch nor transformers, for the reward process.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import uuid
from collections.abc import Callable
from functools import update_wrapper
from types import ModuleType
from typing import Any

_modules: dict[tuple[str, int], ModuleType] = {}
"""The files that ran in this process, by path and time of change."""


class UserFunction:
    """A function in a user's file. It travels to other processes as its name; each loads the file for itself.

    Two of the same function are equal.

    Args:
        reference: `path.py:function`, the path absolute.
        key: of the configuration that names it, for messages.

    Raises:
        ValueError: the file does not run, or has no such function.
    """

    def __init__(self, reference: str, key: str) -> None:
        self.reference = reference
        self.key = key
        path, name = reference.rsplit(":", maxsplit=1)
        self._function = find_function(load_module(path, key), name, key)
        update_wrapper(self, self._function)  # its name and signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserFunction) and self._function is other._function

    def __hash__(self) -> int:
        return hash(self._function)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return UserFunction, (self.reference, self.key)


def load_module(path: str, key: str) -> ModuleType:
    """Runs a Python file as a module of a name of its own, so that two files never share one; a file runs once.

    Args:
        key: of the configuration that names the file, for messages.

    Raises:
        ValueError: it is no Python file, or raised while it ran.
    """
    version = (path, os.stat(path).st_mtime_ns)
    if version in _modules:
        return _modules[version]
    name = f"user_code_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError(f"{key} names {path}, which is not a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{key}: {path} raised {type(error).__name__}: {error}") from error
    _modules[version] = module
    return module


def find_function(module: ModuleType, name: str, key: str) -> Callable[..., Any]:
    """The function of that name in a module that `load_module` gave.

    Raises:
        ValueError: there is none; the message lists the module's functions.
    """
    function = getattr(module, name, None)
    if not callable(function):
        functions = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        ]
        raise ValueError(
            f"{key} names the function {name!r}, but {module.__file__} has {functions}; "
            f"write {module.__file__}:{functions[0] if functions else 'function'}"
        )
    return function
