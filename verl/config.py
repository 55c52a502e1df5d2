# SPDX-License-Identifier: Apache-2.0
"""What every configuration section shares: its checks, and its way in from YAML and command line.

A section is a frozen dataclass. `load_sections` fills a tree of them through an OmegaConf structured config, in the
order dataclass < YAML < command line, and tells as many mistakes at once as it can.
"""

import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

logger = logging.getLogger(__name__)

Section = TypeVar("Section")

USAGE = "write key=value, as in worker.rollout.n=8"


class ConfigValueError(ValueError):
    """A value that its key cannot take; `under` gives the key its full name once the section's place is known."""

    def __init__(self, key: str, value: Any, problem: str) -> None:
        super().__init__(f"{key}={_shown(value)} {problem}")
        self.key, self.value, self.problem = key, value, problem

    def under(self, prefix: str) -> "ConfigValueError":
        return ConfigValueError(prefix + self.key, self.value, self.problem)


@dataclass(frozen=True)
class RetiredKey:
    """A key that existing configurations hold and no field answers to: accepted with one warning."""

    note: str
    """What the warning says after the key and its value."""
    moved_to: str | None = None
    """The key that takes the value; null drops it."""
    allowed: tuple[str, ...] = ()
    """The values that were ever valid; empty allows any."""


@dataclass(frozen=True)
class ConfigSection:
    """Base of all sections: holds `Literal` fields to their values and floats to finite ones, and offers checks."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if _choices(field.type) and _wrong_items(field.type, value):
                raise ConfigValueError(field.name, value, _expected(field.type, value))
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
        """Each of `keys` is a number above 0."""
        for key in keys:
            self.require(getattr(self, key) > 0, key, "is not above 0")

    def require_between(self, low: float, high: float, *keys: str) -> None:
        """Each of `keys` is null or a number in [`low`, `high`]."""
        for key in keys:
            value = getattr(self, key)
            self.require(value is None or low <= value <= high, key, f"is not between {low} and {high}")

    def settle(self, key: str, value: Any) -> None:
        """Write a normal form over what was given. For `__post_init__` alone: afterwards sections do not change."""
        object.__setattr__(self, key, value)

    def settle_path(self, key: str, kind: Literal["file", "folder", "output"]) -> None:
        """Make the path under `key` absolute, since workers run in other folders; null stays null.

        A `file` or `folder` must be there as one; an `output` may come later.
        """
        value = getattr(self, key)
        if value is None:
            return
        path = absolute(value)
        if kind != "output":
            self.require(os.path.exists(path), key, f"does not exist (looked for {path})")
            self.require(os.path.isdir(path) == (kind == "folder"), key, f"is not a {kind} (looked at {path})")
        self.settle(key, path)


def absolute(path: str) -> str:
    """`path` with `~` expanded, from the file system's root."""
    return os.path.abspath(os.path.expanduser(path))


def looks_local(path: str, suffixes: Sequence[str] = ()) -> bool:
    """Whether `path` cannot be a hub id, which is `name` or `owner/name`, by its start, its depth or its suffix."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(tuple(suffixes))


def load_sections(
    config_class: type[Section], argv: Sequence[str], retired_keys: Mapping[str, RetiredKey] | None = None
) -> Section:
    """Build `config_class`, a frozen dataclass of sections, from `config=FILE` and `key=value` arguments.

    Values merge in the order dataclass default < YAML < command line; mappings merge into mappings and
    `${other.key}` interpolates, whole sections too. A bare word for a list is a list of one, an empty section `{}`
    says nothing. A section left null is refused on purpose: it reads like keys that got lost.

    Raises:
        ValueError: one line for every argument that is not `key=value`, unknown key and value of the wrong type; or,
            where there is none of these, for the first value out of range or path to nothing of each section whose
            own sections are right.
    """
    retired_keys = retired_keys or {}
    leaves = dict(_leaf_fields(config_class))
    tree = OmegaConf.structured(config_class)
    _reset(tree, config_class)
    texts: dict[str, str] = {}
    problems: list[str] = []
    warnings: dict[str, str] = {}
    names: dict[tuple[bool, str], str] = {}

    for values, text_of in _read_sources(argv, problems):
        for key, value in _flatten(values, leaves, retired_keys):
            name, text = key, text_of.get(key, _shown(value))
            if key in retired_keys:
                old = retired_keys[key]
                if old.allowed and value not in old.allowed:
                    problems.append(f"{key}={text} is not one of {', '.join(old.allowed)}")
                warnings[key] = f"{key}={text} {old.note}"
                if old.moved_to is None:
                    continue
                key = old.moved_to
            if key not in leaves:
                problems.append(_unknown(key, text, list(leaves)))
                continue
            # The command line overrides the file under either name; within one of them, neither name overrides.
            other = names.setdefault((bool(text_of), key), name)
            if other != name:
                problems.append(f"{name}={text} and {other} are two names of {key}; keep one")
            texts[key] = text
            if get_origin(leaves[key].type) is list and isinstance(value, str) and not value.startswith("${"):
                value = [value]
            try:
                OmegaConf.update(tree, key, value, merge=True)
            except OmegaConfBaseException:
                problems.append(f"{key}={text} {_expected(leaves[key].type, value)}")

    for warning in warnings.values():
        logger.warning("%s", warning)
    if problems:
        raise ValueError("\n".join(problems))
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key}=??? leaves the value open; put one in its place") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}={texts.get(error.full_key, '')} {str(error).splitlines()[0]}") from None
    errors: list[ConfigValueError] = []
    config = _build(config_class, values, errors)
    if errors:
        lines = [f"{error.key}={texts.get(error.key, _shown(error.value))} {error.problem}" for error in errors]
        raise ValueError("\n".join(lines))
    return config


def _read_sources(argv: Sequence[str], problems: list[str]) -> list[tuple[Mapping[str, Any], Mapping[str, str]]]:
    """Read the YAML file named by `config=`, then each argument, in the order in which they override.

    Each comes as its values and, where the user typed them, the words of a key's value.
    """
    files: list[tuple[Mapping[str, Any], Mapping[str, str]]] = []
    overrides: list[tuple[Mapping[str, Any], Mapping[str, str]]] = []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if argument[:1] in ("-", "+", "~"):
            bare = argument.lstrip("-+~")
            remedy = f"write {bare}" if equals else USAGE
            problems.append(f"{argument!r} starts with {argument[0]!r}, but keys take no prefix; {remedy}")
        elif not equals or not key:
            problems.append(f"{argument!r} is not key=value; {f'write {key}=VALUE' if key else USAGE}")
        elif key == "config" and files:
            problems.append(f"{argument!r} names a second file; give one config=FILE and override single keys")
        elif key == "config":
            files.append((_read_yaml(text), {}))
        else:
            try:
                values = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=False)
            except (OmegaConfBaseException, yaml.YAMLError) as error:
                problems.append(f"{argument!r} cannot be read as a YAML value: {str(error).splitlines()[0]}")
            else:
                overrides.append((values, {key: text}))
    return files + overrides


def _flatten(
    values: Mapping[str, Any], leaves: Collection[str], retired: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield (full key, value), opening sections down to a key of `leaves` or `retired`, or one that nobody knows.

    A section that interpolates another one becomes its leaves, so that single keys can still go over them.
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


def _read_yaml(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        folder = Path(path).parent
        nearest = get_close_matches(Path(path).name, sorted(p.name for p in folder.glob("*.y*ml")), n=1)
        hint = f"; did you mean {str(folder / nearest[0])!r}?" if nearest else ""
        raise ValueError(f"config={path} is not a file (looked for {absolute(path)}){hint}")
    try:
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"config={path} is not valid YAML: {error}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"config={path} holds no mapping of keys such as data:, algorithm:, worker:, trainer:")
    return OmegaConf.to_container(tree, resolve=False)


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
    """Turn resolved plain values into the section and those below it; null, with the reason in `errors`, if not."""
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


def _unknown(key: str, text: str, known: Sequence[str]) -> str:
    """The message for a key that no field answers to, with the nearest key that one does."""
    section = f"{key}."
    if any(other.startswith(section) for other in known):
        return f"{key}={text} is a section of keys such as {next(k for k in known if k.startswith(section))}"
    name = key.rpartition(".")[2]
    initials = "".join(word[:1] for word in name.split("_"))
    namesakes = [other for other in known if other.rpartition(".")[2] in (name, initials)]
    nearest = get_close_matches(key, namesakes, n=1, cutoff=0.0) or get_close_matches(key, known, n=1, cutoff=0.6)
    if nearest:
        return f"unknown key {key!r} (value {text}); did you mean {nearest[0]!r}?"
    sections = dict.fromkeys(other.partition(".")[0] for other in known)
    return f"unknown key {key!r} (value {text}); keys begin with {', '.join(sections)}"


def _choices(expected: Any) -> tuple[str, ...]:
    """The values of a `Literal`, an optional one or a list of them; empty for any other type."""
    if get_origin(expected) is Literal:
        return get_args(expected)
    return next((get_args(part) for part in get_args(expected) if get_origin(part) is Literal), ())


def _wrong_items(expected: Any, value: Any) -> list[Any]:
    """What of `value` is not among the choices of its field."""
    if value is None and NoneType in get_args(expected):
        return []
    return [item for item in (value if isinstance(value, list) else [value]) if item not in _choices(expected)]


def did_you_mean(wrong: str, choices: Sequence[str]) -> str:
    """The end of a message about `wrong`: the nearest of `choices`, or nothing where none is near."""
    nearest = get_close_matches(wrong, choices, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _expected(expected: Any, value: Any) -> str:
    """Say in words what a field takes, with the nearest choice."""
    message = f"is not {_in_words(expected)}"
    for wrong in _wrong_items(expected, value) if _choices(expected) else []:
        return message + did_you_mean(str(wrong), _choices(expected))
    return message


def _in_words(expected: Any) -> str:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if NoneType in arguments:
        return f"{_in_words(next(part for part in arguments if part is not NoneType))} or null"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    if origin is list:
        return f"a list, each item {_in_words(arguments[0])}"
    if origin is dict:
        return "a mapping such as {key: value}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[expected]


def _shown(value: Any) -> str:
    """`value` as one would write it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_shown(item) for item in value)}]"
    return str(value)
