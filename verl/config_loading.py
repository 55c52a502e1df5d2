# SPDX-License-Identifier: Apache-2.0
"""Fills configuration sections from a YAML file and the command line.

`load_sections` uses an OmegaConf structured config. Values override each other in the order dataclass < YAML < command
line. All mistakes that can be found at once are reported together.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from verl.config import FLAGS, ConfigValueError, RetiredKey, absolute, as_yaml, cut, did_you_mean, expectation

logger = logging.getLogger(__name__)

Section = TypeVar("Section")

REMOVED = object()
"""Stands for a value that `~key` removes."""

USAGE = "write key=value, as in worker.rollout.n=8"


def load_sections(
    config_class: type[Section],
    argv: Sequence[str],
    retired_keys: Mapping[str, RetiredKey] | None = None,
    remedies: Mapping[str, str] | None = None,
) -> Section:
    """Build `config_class`, a frozen dataclass of sections, from `config=FILE` and `key=value` arguments.

    Values merge in the order dataclass default < YAML < command line. Mappings merge into mappings, and
    `${other.key}` interpolates values and whole sections. A text field keeps the written characters, even if YAML
    would read a number, a switch or a time (`1.10`, `off`, `12:30`). A bare word for a list is a list of one item. An
    empty section `{}` changes nothing; an empty mapping `{}` for a key that holds a mapping empties it. `~key` resets
    a key to its default, or removes one entry of its mapping. A section that is null is refused: its keys were
    probably lost.

    Args:
        retired_keys: keys without a field that are accepted nevertheless.
        remedies: what to write in place of an unknown key, by its last part.

    Raises:
        ValueError: one line for every argument that is not `key=value`, every unknown key and every value of the wrong
            type. If there is none of these: one line per section, for its first value that is out of range or path
            that does not exist.
    """
    retired_keys = retired_keys or {}
    leaves = dict(_leaf_fields(config_class))
    tree = OmegaConf.structured(config_class)
    _reset(tree, config_class)
    texts: dict[str, str] = {}
    problems: list[str] = []
    warnings: dict[str, str] = {}
    names: dict[tuple[bool, str], str] = {}

    for values, text_of, is_typed in _read_sources(argv, problems):
        for key, value in _flatten(values, leaves, retired_keys):
            name, text = key, text_of.get(key) or as_yaml(value)
            if value is REMOVED:
                problems.extend(_remove(tree, key, leaves))
                continue
            if key in retired_keys:
                old = retired_keys[key]
                if old.allowed and value not in old.allowed:
                    problems.append(f"{key}={text} is not one of {', '.join(old.allowed)}")
                warnings[key] = f"{key}={text} {old.note}"
                if old.moved_to is None:
                    continue
                key = old.moved_to
            if key not in leaves:
                problems.append(unknown_key(key, text, list(leaves), remedies or {}))
                continue
            # The command line overrides the file under either name; within one of them, neither name overrides.
            other = names.setdefault((is_typed, key), name)
            if other != name:
                problems.append(f"{name}={text} and {other} are two names of {key}; keep one")
            texts[key] = text
            if get_origin(leaves[key].type) is list and isinstance(value, str) and not value.startswith("${"):
                value = [value]
            if _is_text(leaves[key].type) and value is not None and not isinstance(value, (str, list, dict)):
                value = text
            try:
                OmegaConf.update(tree, key, value, merge=value != {})
            except OmegaConfBaseException:
                problems.append(f"{key}={text} {expectation(leaves[key].type, value)}")

    for warning in warnings.values():
        logger.warning("%s", warning)
    if problems:
        raise ValueError("\n".join(problems))
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key}=??? has no value; write one in its place") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}={texts.get(error.full_key, '')} {str(error).splitlines()[0]}") from None
    errors: list[ConfigValueError] = []
    config = _build(config_class, values, errors)
    if errors:
        lines = [f"{error.key}={texts.get(error.key, as_yaml(error.value))} {error.problem}" for error in errors]
        raise ValueError("\n".join(lines))
    return config


def _is_text(expected: Any) -> bool:
    """Whether a field of this type holds a text, or null."""
    return expected is str or (str in get_args(expected) and set(get_args(expected)) <= {str, NoneType})


def _remove(tree: DictConfig, key: str, leaves: Mapping[str, Any]) -> list[str]:
    """Set a key back to its field's default, or take an entry out of its mapping; returns what is wrong with that."""
    if key in leaves:
        field = leaves[key]
        default = field.default if field.default is not MISSING else field.default_factory()
        OmegaConf.update(tree, key, default, merge=False)
        return []
    parent, _, entry = key.rpartition(".")
    if parent not in leaves:
        return [unknown_key(key, "", list(leaves), {})]
    mapping = OmegaConf.select(tree, parent)
    if not isinstance(mapping, DictConfig) or entry not in mapping:
        return [f"'~{key}' removes an entry that does not exist: {parent} has {sorted(mapping or {})}"]
    del mapping[entry]
    return []


Source = tuple[Mapping[str, Any], Mapping[str, str], bool]
"""Values, their texts as written, and whether they come from the command line."""


def _read_sources(argv: Sequence[str], problems: list[str]) -> list[Source]:
    """Read the YAML file named by `config=`, then each argument, in the order in which they override."""
    files: list[Source] = []
    overrides: list[Source] = []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if argument[:1] == "~" and not equals and len(argument) > 1:
            overrides.append(({argument[1:]: REMOVED}, {argument[1:]: argument}, True))
        elif argument[:1] in ("-", "+", "~"):
            bare = argument.lstrip("-+~")
            remedy = f"; write {bare}" if equals else did_you_mean(argument, FLAGS) or f"; {USAGE}"
            problems.append(f"{argument!r} starts with {argument[0]!r}, but keys take no prefix{remedy}")
        elif not equals and key.endswith((".yaml", ".yml")):
            problems.append(f"{argument!r} is not key=value; write config={key}")
        elif not equals or not key:
            problems.append(f"{argument!r} is not key=value; {f'write {key}=VALUE' if key else USAGE}")
        elif "[" in key or "]" in key:
            problems.append(
                f"{argument!r} has a bracket in its key; keys are names joined by dots, lists are set whole"
            )
        elif key == "config" and files:
            problems.append(f"{argument!r} names a second file; give one config=FILE and override single keys")
        elif key == "config":
            files.append((*_read_yaml(text), False))
        else:
            try:
                values = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=False)
            except (OmegaConfBaseException, yaml.YAMLError) as error:
                problems.append(f"{argument!r} cannot be read as a YAML value: {str(error).splitlines()[0]}")
            else:
                overrides.append((values, {key: text}, True))
    return files + overrides


def _flatten(
    values: Mapping[str, Any], leaves: Collection[str], retired: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield (full key, value) for every key of `leaves` or `retired` and every unknown key in nested sections.

    A section that interpolates another one is expanded into its keys, so that single keys can still override them.
    """
    for name, value in values.items():
        key = f"{prefix}{name}"
        below = [leaf.removeprefix(f"{key}.") for leaf in leaves if leaf.startswith(f"{key}.")]
        if isinstance(value, Mapping) and key not in leaves and key not in retired and (value or below):
            yield from _flatten(value, leaves, retired, f"{key}.")
        elif below and isinstance(value, str) and (origin := re.fullmatch(r"\$\{(\w[\w.]*)\}", value)):
            yield from ((f"{key}.{leaf}", f"${{{origin[1]}.{leaf}}}") for leaf in below)
        else:
            yield key, value


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's values, and its scalars as written, by full key."""
    if not os.path.isfile(path):
        folder = Path(path).parent
        nearest = get_close_matches(Path(path).name, sorted(p.name for p in folder.glob("*.y*ml")), n=1)
        hint = f"; did you mean {str(folder / nearest[0])!r}?" if nearest else ""
        raise ValueError(f"config={path} is not a file (looked for {absolute(path)}){hint}")
    try:
        tree = OmegaConf.load(path)
        written = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config={path} is not valid YAML: {cut(str(error), 400)}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"config={path} holds no mapping of keys such as data:, algorithm:, worker:, trainer:")
    return OmegaConf.to_container(tree, resolve=False), dict(_scalars(written))


def _scalars(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (full key, text) of every scalar in mappings of mappings."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _scalars(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str):
        yield key, values


def _reset(tree: DictConfig, config_class: type) -> None:
    """Make `tree`, a structured config of frozen dataclasses, writable and give it the fields' own defaults.

    OmegaConf fills a nested section from an *instance*, in which `__post_init__` has already settled values (a
    checkpoint folder named after the default experiment, say) that must follow the user's.
    """
    OmegaConf.set_readonly(tree, False)
    for field in fields(config_class):
        if is_dataclass(field.type):
            _reset(tree[field.name], field.type)
        elif field.default is not MISSING:
            tree[field.name] = field.default


def _leaf_fields(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full key, field) of every field that is not itself a section."""
    for field in fields(config_class):
        if is_dataclass(field.type):
            yield from _leaf_fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def _build(
    config_class: type[Section], values: Mapping[str, Any], errors: list[ConfigValueError], prefix: str = ""
) -> Section | None:
    """Build the section and its nested sections from resolved values; null on errors, which are added to `errors`."""
    sections = {
        field.name: _build(field.type, values[field.name], errors, f"{prefix}{field.name}.")
        for field in fields(config_class)
        if is_dataclass(field.type)
    }
    if None in sections.values():
        return None
    try:
        return config_class(**{**values, **sections})
    except ConfigValueError as error:
        errors.append(error.under(prefix))
        return None


def unknown_key(key: str, text: str, known: Sequence[str], remedies: Mapping[str, str]) -> str:
    """The error message for an unknown key: what to write instead, or the nearest key."""
    section = f"{key}."
    if any(other.startswith(section) for other in known):
        return f"{key}={text} is a section of keys such as {next(k for k in known if k.startswith(section))}"
    name = key.rpartition(".")[2]
    if name in remedies and not any(other.rpartition(".")[2] == name for other in known):
        return f"unknown key {key!r} (value {text}); {remedies[name]}"
    initials = "".join(word[:1] for word in name.split("_"))
    namesakes = [other for other in known if other.rpartition(".")[2] in (name, initials)]
    nearest = get_close_matches(key, namesakes, n=1, cutoff=0.0) or get_close_matches(key, known, n=1, cutoff=0.6)
    if nearest:
        return f"unknown key {key!r} (value {text}); did you mean {nearest[0]!r}?"
    sections = dict.fromkeys(other.partition(".")[0] for other in known)
    return f"unknown key {key!r} (value {text}); keys begin with {', '.join(sections)}"
