# SPDX-License-Identifier: Apache-2.0
"""Writes docs/en/configuration.md and docs/en/metrics.md: `python scripts/write_references.py`.

The pages come from the docstrings under the configuration's fields and from `verl/trainer/metric_table.py`. A test
holds them level.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from verl.trainer.config import PPOConfig
from verl.trainer.help_text import Topic, default_of, topics_of, type_of
from verl.trainer.metric_table import AREAS

ROOT = Path(__file__).resolve().parent.parent

CONFIGURATION = """\
# Configuration reference

Every key, with its type and default. `verl --help` prints the same, `verl --help SECTION` one section. A key of the
command line, `key=value`, overrides the YAML file, and the file overrides the default. `data.train_files`,
`data.val_files`, `worker.actor.model.model_path` and `worker.reward.reward_function` are required.

This page is written by `scripts/write_references.py` from the docstrings in the code.
"""

METRICS = """\
# Metrics reference

Every metric that a run can log: what it means, when it is healthy, and what to do when it is not. Ranges are rules of
thumb for runs with the default configuration, not measured bounds. In names, `{a,b}` stands for each of the words and
`<word>` for any.

This page is written by `scripts/write_references.py` from `verl/trainer/metric_table.py`.
"""


def configuration_page() -> str:
    """docs/en/configuration.md."""
    parts = [CONFIGURATION]
    for section, topics in groupby(topics_of(PPOConfig), _section_of):
        heading, *keys = topics
        if keys or heading.field is not None:
            parts.append(f"## {section}\n\n{_one_line(heading.docstring)}\n")
            rows = [(f"`{key.key}`", type_of(key.field), f"`{default_of(key.field)}`", key.docstring) for key in keys]
            parts.append(_table(("key", "type", "default", "meaning"), rows))
    return "\n".join(parts)


def metrics_page() -> str:
    """docs/en/metrics.md."""
    parts = [METRICS]
    for area in AREAS:
        parts.append(f"## {area.title}\n\n{area.description}\n")
        rows = [
            (
                f"`{metric.name}`",
                metric.meaning + (" (GPUs only)" if metric.needs_gpu else ""),
                metric.healthy,
                metric.action,
            )
            for metric in area.metrics
        ]
        parts.append(_table(("metric", "meaning", "healthy", "otherwise"), rows))
    return "\n".join(parts)


PAGES = {"docs/en/configuration.md": configuration_page, "docs/en/metrics.md": metrics_page}


def _section_of(topic: Topic) -> str:
    return topic.key if topic.field is None else topic.key.rpartition(".")[0]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(_one_line(cell).replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
