# SPDX-License-Identifier: Apache-2.0
"""Tables of functions that the configuration names: registered ones by their name, others as `path.py:function`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from verl.config import did_you_mean, names_a_file
from verl.utils.user_code import UserFunction

Function = TypeVar("Function", bound=Callable)


class Registry(dict[str, Function]):
    """Functions of one kind by name.

    Args:
        kind: what they are, for messages.
        key: of the configuration that names one of them.
        remedies: what to say of a name that is often tried and that is none.
    """

    def __init__(self, kind: str, key: str, remedies: dict[str, str] | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.key = key
        self.remedies = remedies or {}

    def register(self, name: str) -> Callable[[Function], Function]:
        """Decorator that makes a function known under `name`.

        Raises ValueError when the name is taken.
        """

        def add(function: Function) -> Function:
            if name in self:
                raise ValueError(f"{self.kind} '{name}' is already {self[name].__qualname__}; use another name")
            self[name] = function
            return function

        return add

    def find(self, name: str, key: str | None = None) -> Function | UserFunction:
        """The function that the configuration names: a registered one, or one in a file of the user's.

        Args:
            key: of the configuration, where it is not the registry's own.

        Raises:
            ValueError: nothing of that name is registered, or the file has no such function.
        """
        if name in self:
            return self[name]
        if names_a_file(name):
            return UserFunction(name, key or self.key)
        remedy = self.remedies.get(name) or did_you_mean(name, list(self))
        raise ValueError(f"{key or self.key}={name} is not one of {', '.join(self)}, or path.py:function{remedy}")
