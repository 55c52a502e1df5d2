# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_references.py
"""The reference pages are what their script writes, and the table of metrics names each metric once."""

from collections import Counter
from pathlib import Path

import pytest
from write_references import PAGES

from verl.trainer.metric_table import all_metrics, metric_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("path", PAGES)
def test_a_reference_page_is_what_its_script_writes(path: str) -> None:
    written = (ROOT / path).read_text(encoding="utf-8")
    assert written == PAGES[path](), "run `python scripts/write_references.py`"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("reward/retried", "reward/retried"),
        ("reward/my_part", "reward/<key>"),
        ("val/accuracy_reward", "val/<key>_reward"),
        ("val_prompt_length/clip_ratio", "{prompt_length,val_prompt_length}/clip_ratio"),
        ("signals/spearman/vgr_entropy", "signals/spearman/<a>_<b>"),
        ("signals/vgr/p10", "signals/<name>/{mean,std,p10,p90}"),
    ],
)
def test_a_metric_is_found_under_its_own_row(name: str, row: str) -> None:
    assert metric_of(name).name == row


def test_a_metric_that_nobody_described_has_no_row() -> None:
    assert metric_of("actor/no_such_metric") is None
    assert metric_of("token_weights/mean_of_means") is None


def test_rows_have_a_name_of_their_own_and_a_meaning() -> None:
    names = Counter(metric.name for metric in all_metrics())
    assert [name for name, count in names.items() if count > 1] == []
    assert [metric.name for metric in all_metrics() if not metric.meaning] == []
