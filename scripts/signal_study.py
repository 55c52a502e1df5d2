# SPDX-License-Identifier: Apache-2.0
"""A study's file: the arms, warm starts and seeds that `scripts/compare_signals.py` trains."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from verl.config import did_you_mean

SUCH_AS = "such as trainer.max_steps=9"
PLACEHOLDERS = ("data", "warm_start", "seed", "python")


class StudyError(ValueError):
    """An error of a study or of a run."""


@dataclass(frozen=True)
class Study:
    """A study's file."""

    name: str
    config: str
    arms: dict[str, list[str]]
    """Overrides by arm."""
    seeds: list[int]
    warm_starts: list[int | str]
    overrides: list[str]
    prepare: str | None = None
    accuracy: str = "accuracy"

    def __post_init__(self) -> None:
        _require(isinstance(self.config, str), "config", self.config, "is not the path of a configuration")
        _require(self.prepare is None or isinstance(self.prepare, str), "prepare", self.prepare, "is not a command")
        _require(isinstance(self.accuracy, str), "accuracy", self.accuracy, "is not a key of the reward function")
        _require(isinstance(self.arms, dict) and self.arms, "arms", self.arms, "is not a mapping of arms to overrides")
        for key, kinds, what in (("seeds", int, "integers"), ("warm_starts", (int, str), "names or integers")):
            values = getattr(self, key)
            are_good = isinstance(values, list) and values and all(isinstance(value, kinds) for value in values)
            _require(are_good and len(set(values)) == len(values), key, values, f"is not a list of different {what}")
        for name in (*self.arms, *self.warm_starts):
            is_name = re.fullmatch(r"[\w.+-]+", str(name)) is not None
            _require(is_name, "arms" if name in self.arms else "warm_starts", name, "cannot name a folder")
        of_arms = {f"arms.{arm}": overrides for arm, overrides in self.arms.items()}
        for key, overrides in {"overrides": self.overrides, **of_arms}.items():
            _require(isinstance(overrides, list), key, overrides, f"is not a list of overrides {SUCH_AS}")
            for override in overrides:
                _require("=" in str(override), key, override, f"is not an override {SUCH_AS}")
                filled(str(override), key, dict.fromkeys(PLACEHOLDERS, ""))
        if self.prepare is not None:
            self.preparation("", "")

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study's file.

        Raises:
            StudyError: the file is wrong; the message names the key.
        """
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except yaml.YAMLError as error:
            raise StudyError(f"{path} is not YAML: {error}") from None
        if not isinstance(content, dict):
            raise StudyError(f"{path} is not a mapping of keys such as arms and seeds")
        known = [field.name for field in fields(cls) if field.name != "name"]
        try:
            for key, value in content.items():
                _require(key in known, key, value, f"is not a key of a study{did_you_mean(str(key), known)}")
            for key in ("config", "arms", "seeds"):
                _require(key in content, key, None, "is missing")
            return cls(path.stem, **({"warm_starts": [0], "overrides": []} | content))
        except StudyError as error:
            raise StudyError(f"{path}: {error}") from None

    def preparation(self, warm_start: int | str, data: Path | str) -> str:
        """The command that makes the data of a warm start, filled in."""
        return filled(self.prepare, "prepare", {"data": data, "warm_start": warm_start, "python": sys.executable})

    def runs(
        self,
        arms: Sequence[str] | None = None,
        warm_starts: Sequence[str] | None = None,
        seeds: Sequence[str] | None = None,
    ) -> list[Run]:
        """All runs, or a selection. The arms of a warm start and a seed come together, so that pairs complete early.

        Raises:
            StudyError: the selection names something that the study does not have.
        """
        wanted = {"arms": arms, "warm_starts": warm_starts, "seeds": seeds}
        for key, values in wanted.items():
            there = [str(one) for one in getattr(self, key)]
            for value in values or ():
                _require(value in there, f"--{key.replace('_', '-')}", value, f"is none of {', '.join(there)}")
        return [
            Run(self, arm, warm_start, seed)
            for warm_start in self.warm_starts
            for seed in self.seeds
            for arm in self.arms
            if (arms is None or arm in arms)
            and (warm_starts is None or str(warm_start) in warm_starts)
            and (seeds is None or str(seed) in seeds)
        ]


@dataclass(frozen=True)
class Run:
    """One training."""

    study: Study
    arm: str
    warm_start: int | str
    seed: int

    @property
    def key(self) -> tuple[str, int | str, int]:
        """The unique key of the run."""
        return self.arm, self.warm_start, self.seed

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.arm}_{self.warm_start}_{self.seed}"

    def overrides(self, data: Path) -> list[str]:
        """The overrides of the study and of the arm, filled in."""
        values = dict(zip(PLACEHOLDERS, (data, self.warm_start, self.seed, sys.executable), strict=True))
        given = [("overrides", self.study.overrides), (f"arms.{self.arm}", self.study.arms[self.arm])]
        return [filled(str(override), key, values) for key, overrides in given for override in overrides]


def _require(condition: Any, key: str, value: Any, problem: str) -> None:
    if not condition:
        raise StudyError(f"{key}={value!r} {problem}")


def filled(template: str, key: str, values: Mapping[str, Any]) -> str:
    """`template` with its placeholders filled. Braces of YAML flow mappings are written double, as in Python."""
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise StudyError(f"{key}={template!r} has an unknown placeholder ({error}); there are {known}") from None
