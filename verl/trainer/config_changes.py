# SPDX-License-Identifier: Apache-2.0
"""The keys that have other values than before a resume."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from verl.config import as_yaml, cut
from verl.trainer.config import PPOConfig
from verl.trainer.sinks import FileSink
from verl.utils.checkpoint import ResumePoint
from verl.utils.masking import masked

EXPECTED = ("trainer.find_last_checkpoint", "trainer.load_checkpoint_path")
"""Keys that say how to resume."""

LONGEST_VALUE_SHOWN = 40
"""Characters."""


def config_changes(config: PPOConfig, resume_point: ResumePoint | None) -> list[str]:
    """A line `key=value, which was VALUE` for each key with another value than before a resume.

    The values before come from `experiment_config.json` in the run's folder, which the logger `file` writes. Without
    this file, and where the checkpoint comes from another folder, the list is empty. Secrets are compared as masked:
    a changed secret is not seen. Call this before a logger replaces the file.
    """
    folder = config.trainer.save_checkpoint_path
    path = Path(folder, FileSink.CONFIG)
    if resume_point is None or not resume_point.is_under(folder) or not path.exists():
        return []
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        return [f"what may have changed is unknown: {path} is damaged ({error})"]
    return [
        f"{key}={_shown(value)}, which was {_shown(old)}"
        for key, value, old in _differences(config, before, "")
        if key not in EXPECTED
    ]


def _differences(section: Any, before: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Keys with their values and their values before. Keys that the other run did not have, as in another release of
    this package, are left out."""
    if not isinstance(before, Mapping):
        return
    for field in fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if field.name not in before:
            continue
        if is_dataclass(value):
            yield from _differences(value, before[field.name], f"{key}.")
            continue
        value = json.loads(json.dumps(masked({field.name: value})[field.name]))  # as it was written
        if value != before[field.name]:
            yield key, value, before[field.name]


def _shown(value: Any) -> str:
    return cut(as_yaml(value), LONGEST_VALUE_SHOWN)
