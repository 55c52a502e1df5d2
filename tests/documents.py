# SPDX-License-Identifier: Apache-2.0
"""The documents as tests read them: README and the pages of docs/, in both languages."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = {"en": "README.md", "zh": "README_zh.md"}
LANGUAGES = tuple(READMES)
FENCE = re.compile(r"^ *(`{3,})(\w*)\n(.*?)^ *\1 *$", re.DOTALL | re.MULTILINE)


def pages_of(language: str) -> list[Path]:
    """README and every page in that language."""
    return [ROOT / READMES[language], *sorted((ROOT / "docs" / language).rglob("*.md"))]


def text_of(language: str) -> str:
    """All pages in that language, one after the other."""
    return "\n".join(page.read_text(encoding="utf-8") for page in pages_of(language))


def tables_of(language: str) -> list[str]:
    """The tables of all pages, each as its lines."""
    return re.findall(r"(?:^\|.*\n)+", text_of(language), re.M)


def code_blocks(text: str, kind: str | None = None) -> list[str]:
    """What stands in fenced blocks, of one kind (`bash`, `yaml`) or of all."""
    return [block for _, name, block in FENCE.findall(text) if kind is None or name == kind]


def code_spans(text: str) -> list[str]:
    """What stands between backticks, outside fenced blocks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))


def files_in(page: str) -> dict[str, str]:
    """The files that a page of docs/en shows, by name: fenced blocks whose first line is a comment with that name."""
    heads = [block.partition("\n") for block in code_blocks((ROOT / "docs" / "en" / page).read_text(encoding="utf-8"))]
    named = [(head.removeprefix("# "), rest) for head, _, rest in heads if re.fullmatch(r"# \S+\.\w+", head)]
    files = dict(named)
    assert len(files) == len(named), "two blocks of one name"
    return files
