# SPDX-License-Identifier: Apache-2.0
"""The text of `--help`: every key with type, default and meaning, from the docstrings under the fields."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from verl.config import ConfigSection, as_yaml, in_words
from verl.trainer.config import REMEDIES

USAGE = """\
usage: verl [config=FILE] [key=value ...] [--dry-run]
       verl --help [SECTION or KEY ...]"""

ABOUT = """\
Trains a vision-language model with reinforcement learning. `python3 -m verl.trainer.main` is the same command. FILE
is a YAML file of keys; key=value sets one key and overrides the file, as in worker.rollout.n=8. Four keys are
required: data.train_files, data.val_files, worker.actor.model.model_path and worker.reward.reward_function.
examples/config.yaml has the usual ones.

--dry-run shows the resolved keys, the batch sizes and the machine, checks the first rows of the data, says what would
be refused, and trains nothing. Its exit code is 0, or 2 where the run would be refused.

--help lists all keys, the keys of a section such as algorithm or worker.actor.optim, or one key, each with its
default.
"""

WIDTH_OF_PIPE = 100
"""Width in columns when the output is no terminal and COLUMNS is not set."""

NARROWEST, WIDEST = 40, 120
"""Largest width in columns; longer lines are hard to read."""


@dataclass(frozen=True)
class Topic:
    """One key, or the heading of a section."""

    key: str
    """The full name; empty for the whole configuration."""
    docstring: str
    field: Field | None
    """The dataclass field of a key; None for a section."""

    def text(self, width: int) -> str:
        """A paragraph of at most `width` columns."""
        if self.field is None:
            return _wrapped(f"{self.key}: {self.docstring}", width, "", "    ")
        head = f"{self.key}={default_of(self.field)} ({type_of(self.field)})"
        return _wrapped(head, width, "  ", "    ") + "\n" + _wrapped(self.docstring, width, "      ", "      ")


def help_text(config_class: type[ConfigSection], names: Sequence[str], width: int | None = None) -> str:
    """The usage and all keys, or the keys of the sections and the single keys that are named.

    Args:
        config_class: the whole configuration.
        width: columns; None takes the terminal's.

    Raises:
        ValueError: no section or key has a given name; the message suggests the nearest one.
    """
    if width is None:
        columns = shutil.get_terminal_size((WIDTH_OF_PIPE, 24)).columns
        width = min(max(columns, NARROWEST), WIDEST)
    topics = list(topics_of(config_class))
    if names:
        chosen = [topic for name in names for topic in _named(name, topics)]
        return "\n\n".join(topic.text(width) for topic in chosen) + "\n"
    paragraphs = [_wrapped(text, width) for text in ABOUT.split("\n\n")]
    return "\n\n".join([USAGE, *paragraphs, *(topic.text(width) for topic in topics)]) + "\n"


def topics_of(section: type[ConfigSection], prefix: str = "") -> Iterator[Topic]:
    """The keys of a section in order, then each nested section, with a heading."""
    docstrings = field_docstrings(section)
    if prefix:
        yield Topic(prefix.removesuffix("."), _first_paragraph(section), None)
    for field in fields(section):
        if not is_dataclass(field.type):
            yield Topic(prefix + field.name, docstrings[field.name], field)
    for field in fields(section):
        if is_dataclass(field.type):
            yield from topics_of(field.type, f"{prefix}{field.name}.")


def field_docstrings(section: type[ConfigSection]) -> dict[str, str]:
    """The docstring under each field, by name, for the section and its base classes."""
    docstrings: dict[str, str] = {}
    for owner in reversed(section.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for node, after in pairwise(tree.body):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                docstrings[node.target.id] = after.value.value
    return docstrings


def _named(name: str, topics: Sequence[Topic]) -> list[Topic]:
    name = name.strip(".")
    matches = [topic for topic in topics if topic.key == name or topic.key.startswith(f"{name}.")]
    if matches:
        return matches
    keys = [topic.key for topic in topics]
    last = name.rpartition(".")[2]
    namesakes = [key for key in keys if key.rpartition(".")[2] == last]
    if last in REMEDIES and not namesakes:
        raise ValueError(f"no section or key is called {name!r}; {REMEDIES[last]}")
    nearest = get_close_matches(name, namesakes, n=1, cutoff=0.0) or get_close_matches(name, keys, n=1)
    sections = ", ".join(key for key in keys if "." not in key)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the sections are {sections}"
    raise ValueError(f"no section or key is called {name!r}; {hint}")


def _first_paragraph(section: type[ConfigSection]) -> str:
    return inspect.getdoc(section).partition("\n\n")[0]


def default_of(field: Field) -> str:
    value = field.default if field.default is not MISSING else field.default_factory()
    return '""' if value == "" else as_yaml(value)


def type_of(field: Field) -> str:
    """The type in words, with every choice."""
    words = in_words(field.type)
    return f"{words}, or null" if field.type is Any and field.default is None else words


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
