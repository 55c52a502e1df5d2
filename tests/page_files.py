# SPDX-License-Identifier: Apache-2.0
"""The files that a page of docs/ shows, for tests that run them."""

import re
from pathlib import Path

DOCUMENTS = Path(__file__).resolve().parent.parent / "docs" / "en"


def files_in(page: str) -> dict[str, str]:
    """The contents of each fenced block whose first line is a comment with its file's name, by that name."""
    text = (DOCUMENTS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    files = dict(blocks)
    assert len(files) == len(blocks), "two blocks of one name"
    return files
