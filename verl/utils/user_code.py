# SPDX-License-Identifier: Apache-2.0
"""Functions that a user names as `path.py:function` in the configuration.

The reward process runs this module, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import update_wrapper
from pathlib import Path
from types import ModuleType
from typing import Any

EXTRAS = {"mathruler": "math", "pylatexenc": "math"}
"""The extra of the package that installs a module which the example reward functions import."""

_modules: dict[tuple[str, int], ModuleType] = {}
"""The modules loaded in this process, by path and modification time."""


class UserFunction:
    """A function in a user's file. It is pickled as its reference, and each process loads the file itself.

    Two objects of the same function are equal.

    Args:
        reference: `path.py:function`, the path absolute.
        key: the configuration key that names it, for messages.

    Raises:
        ValueError: the file does not run, or has no such function.
    """

    def __init__(self, reference: str, key: str) -> None:
        self.reference = reference
        self.key = key
        path, name = reference.rsplit(":", maxsplit=1)
        self._function = find_function(load_module(path, key), name, key)
        update_wrapper(self, self._function, updated=())  # its name and signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserFunction) and self._function is other._function

    def __hash__(self) -> int:
        return hash(self._function)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return UserFunction, (self.reference, self.key)


def load_module(path: str, key: str) -> ModuleType:
    """Runs a Python file as a module, once.

    The module has the file's name, and its folder is on the path, so that pickle in a spawned process finds its
    classes, and the file can import its neighbours. The folder comes last and hides nothing. If the name is taken, by
    an existing module (`math.py`) or another user file, the module gets a unique name that only this process knows.

    Args:
        key: the configuration key that names the file, for messages.

    Raises:
        ValueError: it is no Python file, or running it raised an exception.
    """
    version = (path, os.stat(path).st_mtime_ns)
    if version in _modules:
        return _modules[version]
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)
    name = Path(path).stem
    if not _is_free(name, path):
        name = f"user_code_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError(f"{key} names {path}, which is not a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit, which would end the process without naming the file
        del sys.modules[name]
        raise ValueError(f"{key}: {path} raised {type(error).__name__}: {error}{_remedy(error)}") from error
    _modules[version] = module
    return module


def _remedy(error: BaseException) -> str:
    """How to install a module that is missing, where that is known; empty elsewhere."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in EXTRAS:
        return ""
    return f"; `{sys.executable} -m pip install -e '.[{EXTRAS[error.name]}]'` in the repository's root installs it"


def _is_free(name: str, path: str) -> bool:
    """Whether `import name` finds this file in every process with the same path."""
    if not name.isidentifier():
        return False
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None)
    else:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
    return origin is not None and os.path.exists(origin) and os.path.samefile(origin, path)


def require_defined(reference: str, key: str) -> None:
    """Raise if the file of a `path.py:function` cannot have that function, judged without running it.

    Raises:
        ValueError: the file is not valid Python, or does not define the name at its top level.
    """
    path, name = reference.rsplit(":", maxsplit=1)
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{key}={reference} cannot be read as Python: {error}") from None
    names = {bound for node in _top_level(tree) for bound in _names_bound(node)}
    if not names & {name, "*", "__getattr__"} and "globals" not in _names_called(tree):
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        raise _no_such_function(key, name, path, [one for one in functions if not one.startswith("_")])


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside functions and classes, including the definitions themselves."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _top_level(node)


def _names_bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0]


def _names_called(tree: ast.AST) -> set[str]:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


def find_function(module: ModuleType, name: str, key: str) -> Callable[..., Any]:
    """The function of that name in a module from `load_module`.

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
        raise _no_such_function(key, name, module.__file__, functions)
    return function


def _no_such_function(key: str, name: str, path: str, functions: Sequence[str]) -> ValueError:
    return ValueError(
        f"{key} names the function {name!r}, but {path} has {list(functions)}; "
        f"write {path}:{functions[0] if functions else 'function'}"
    )
