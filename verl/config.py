# SPDX-License-Identifier: Apache-2.0
"""The base of configuration sections: a frozen dataclass that checks its values when it is built.

`verl/config_loading.py` fills sections from YAML and the command line. This file loads nothing but the standard
library, since every process of a run unpickles its sections.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, get_args, get_origin

DRY_RUN, HELP = "--dry-run", "--help"
FLAGS = (DRY_RUN, HELP)
"""Arguments of the command that are not keys; `verl.trainer.main` takes them out before the configuration is read."""


class ConfigValueError(ValueError):
    """A value that its key cannot take. `under` adds the section's prefix to the key."""

    def __init__(self, key: str, value: Any, problem: str) -> None:
        super().__init__(f"{key}={as_yaml(value)} {problem}")
        self.key, self.value, self.problem = key, value, problem

    def under(self, prefix: str) -> "ConfigValueError":
        return ConfigValueError(prefix + self.key, self.value, self.problem)


@dataclass(frozen=True)
class RetiredKey:
    """A key of existing configurations that has no field here: accepted with one warning."""

    note: str
    """What the warning says after the key and its value."""
    moved_to: str | None = None
    """The key that takes the value; null drops it."""
    allowed: tuple[str, ...] = ()
    """The values that were valid; empty allows any."""


@dataclass(frozen=True)
class ConfigSection:
    """Base of all sections: checks that `Literal` fields hold an allowed value and that floats are finite."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if _choices(field.type) and _wrong_items(field.type, value):
                raise ConfigValueError(field.name, value, expectation(field.type, value))
            for number in value if isinstance(value, (list, tuple)) else [value]:
                is_finite = not isinstance(number, float) or math.isfinite(number)
                self.require(is_finite, field.name, "is not a finite number")

    def require(self, condition: bool, key: str, problem: str) -> None:
        """Raise `ConfigValueError` for `key`, with its value and `problem`, unless `condition` holds."""
        if not condition:
            raise ConfigValueError(key, getattr(self, key), problem)

    def require_at_least(self, minimum: float, *keys: str) -> None:
        """Each of `keys` is null or a number not below `minimum`."""
        for key in keys:
            value = getattr(self, key)
            self.require(value is None or value >= minimum, key, f"is below {minimum}")

    def require_above_0(self, *keys: str) -> None:
        """Each of `keys` is null or a number above 0."""
        for key in keys:
            value = getattr(self, key)
            self.require(value is None or value > 0, key, "is not above 0")

    def require_between(self, low: float, high: float, *keys: str) -> None:
        """Each of `keys` is null or a number in [`low`, `high`]."""
        for key in keys:
            value = getattr(self, key)
            self.require(value is None or low <= value <= high, key, f"is not between {low} and {high}")

    def refuse_contradictions(self) -> None:
        """Raise the first error that the section's `CONTRADICTIONS` (`verl/trainer/config_checks.py`) find.

        To be called at the end of `__post_init__`, after each value has been checked by itself.
        """
        from verl.trainer.config_checks import contradictions  # it imports every section

        for error in contradictions(self):
            raise error

    def settle(self, key: str, value: Any) -> None:
        """Replace a value by its normal form. For `__post_init__` alone: afterwards sections do not change."""
        object.__setattr__(self, key, value)

    def settle_path(self, key: str, kind: Literal["file", "folder", "output"]) -> None:
        """Make the path under `key` absolute, since workers run in other folders; null stays null.

        A `file` or `folder` must exist; an `output` need not.
        """
        value = getattr(self, key)
        if value is None:
            return
        path = absolute(value)
        if kind != "output":
            self.require(os.path.exists(path), key, f"does not exist (looked for {path})")
            self.require(os.path.isdir(path) == (kind == "folder"), key, f"is not a {kind} (looked at {path})")
        self.settle(key, path)

    def settle_function(self, key: str, default: str | None = None) -> None:
        """Make the path of a `path.py:function` under `key` absolute; null and plain names stay as they are.

        Args:
            default: the function to use if the value is only a path; None makes the function's name required.
        """
        value = getattr(self, key)
        if value is not None:
            self.settle(key, self._settled_function(key, value, default))

    def settle_functions(self, key: str) -> None:
        """`settle_function` for each item of the list under `key`."""
        self.settle(key, [self._settled_function(key, value, None) for value in getattr(self, key)])

    def _settled_function(self, key: str, value: str, default: str | None) -> str:
        if default is None and not names_a_file(value):
            return value
        path, colon, function = value.rpartition(":")
        if not colon:
            path, function = value, default or ""
        self.require(bool(function), key, "names no function; write path.py:function")
        path = absolute(path)
        self.require(os.path.isfile(path), key, f"names no file (looked for {path})")
        return f"{path}:{function}"


def cut(text: str, limit: int = 100) -> str:
    """`text` for an error message, cut after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def names_a_file(value: str) -> bool:
    """Whether `value` is a user's `path.py:function` and not a registered name."""
    return ":" in value or value.endswith(".py")


def absolute(path: str) -> str:
    """`path` with `~` expanded, from the file system's root."""
    return os.path.abspath(os.path.expanduser(path))


def looks_local(path: str, suffixes: Sequence[str] = ()) -> bool:
    """Whether the start, depth or suffix of `path` rules out a hub id, which is `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(tuple(suffixes))


def _choices(expected: Any) -> tuple[str, ...]:
    """The choices of a `Literal`, an optional `Literal` or a list of them; empty for any other type."""
    if get_origin(expected) is Literal:
        return get_args(expected)
    return next((get_args(part) for part in get_args(expected) if get_origin(part) is Literal), ())


def _wrong_items(expected: Any, value: Any) -> list[Any]:
    """The items of `value` that are not among the choices of its field."""
    if value is None and NoneType in get_args(expected):
        return []
    return [item for item in (value if isinstance(value, list) else [value]) if item not in _choices(expected)]


def did_you_mean(wrong: str, choices: Sequence[str]) -> str:
    """The end of an error message: suggests the choice nearest to `wrong`; empty if none is near."""
    nearest = get_close_matches(wrong, choices, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def expectation(expected: Any, value: Any) -> str:
    """The end of an error message: what the field takes, with the nearest choice."""
    message = f"is not {in_words(expected)}"
    for wrong in _wrong_items(expected, value) if _choices(expected) else []:
        return message + did_you_mean(str(wrong), _choices(expected))
    return message


def in_words(expected: Any) -> str:
    """The type of a field in words; `Any` stands for a text or a list."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if NoneType in arguments:
        return f"{in_words(next(part for part in arguments if part is not NoneType))} or null"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    if origin is list:
        (item,) = arguments
        if get_origin(item) is Literal:
            return f"a list whose items are among {', '.join(get_args(item))}"
        return f"a list of {in_words(item).removeprefix('a ')}s"
    if origin is dict:
        return "a mapping such as {key: value}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Any: "a text or a list"}
    return words[expected]


def as_yaml(value: Any) -> str:
    """`value` as one would write it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(as_yaml(item) for item in value)}]"
    return str(value)
