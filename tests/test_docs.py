# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_docs.py
"""What the documents name is there: links, anchors, keys, files; and the two languages have the same pages."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from tests.documents import FENCE, LANGUAGES, READMES, ROOT, code_blocks, code_spans, pages_of, tables_of
from verl.trainer.config import PPOConfig, _retired_keys
from verl.trainer.help_text import topics_of

TOPICS = list(topics_of(PPOConfig))
KEYS = {topic.key for topic in TOPICS if topic.field is not None}
MAPPINGS = {topic.key for topic in TOPICS if topic.field is not None and "dict" in str(topic.field.type)}
SECTIONS = {topic.key for topic in TOPICS if topic.field is None}
ROOTS = "data|algorithm|worker|trainer"
PAGES = [page for language in LANGUAGES for page in pages_of(language)]
PROJECT_PAGES = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors_of(text: str) -> set[str]:
    """The anchors that headings have, as GitHub and the site make them."""
    anchors: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{name}-{anchors[name]}" if anchors[name] else name)
        anchors[name] += 1
    return names


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / unquote(path)).resolve() if path else page
        if not target.exists():
            broken.append(link)
        elif anchor and unquote(anchor) not in anchors_of(text if target == page else target.read_text()):
            broken.append(link)
    return broken


def keys_in(text: str) -> set[str]:
    """Dotted keys: with a value anywhere in code, alone in a span, or nested in a YAML block."""
    keys = set()
    for code in (*code_blocks(text), *code_spans(text)):
        keys |= set(re.findall(rf"(?<![\w./])((?:{ROOTS})(?:\.\w+)+)=", code))
    keys |= {span for span in code_spans(text) if re.fullmatch(rf"(?:{ROOTS})(?:\.\w+)+", span)}
    for block in code_blocks(text, "yaml"):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and set(content) <= set(ROOTS.split("|")):
            keys |= set(flattened(content))
    return keys


def flattened(content: dict, prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in SECTIONS:
            yield from flattened(value, f"{key}.")
        else:
            yield key


def is_key(key: str) -> bool:
    """Whether it is a key, an old one, a section, or a place in a key that holds a mapping."""
    return key in KEYS | SECTIONS | set(_retired_keys()) or any(key.startswith(f"{mapping}.") for mapping in MAPPINGS)


def named_files(text: str) -> set[str]:
    """Files of the repository that code names by their path, and scripts that spans name alone; no placeholders."""
    files = set()
    for code in (*code_blocks(text), *code_spans(text)):
        files |= set(
            re.findall(
                r"(?<![\w./-])((?:scripts|examples|tests|docs|verl)/[\w./-]+\.(?:py|sh|ya?ml|json|md|png|svg|jinja))\b",
                code,
            )
        )
    files |= {span for span in code_spans(text) if re.fullmatch(r"\w+\.sh", span)}
    return {file for file in files if not Path(file).stem.isupper()}


@pytest.mark.parametrize("page", [*PAGES, *PROJECT_PAGES], ids=relative)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_link_to_nothing_is_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One `key`: **two**\n\n## Twice\n\n## Twice\n")
    page.write_text(
        "[a](other.md#one-key-two) [b](other.md#twice-1) [c](other.md#three) [d](gone.md) `[e](gone.md)`\n"
    )
    assert broken_links(page, page.read_text()) == ["other.md#three", "gone.md"]


def test_both_languages_have_the_same_pages() -> None:
    english, chinese = ({page.name for page in pages_of(language)[1:]} for language in LANGUAGES)
    assert english == chinese


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"\b(?:en|zh)/\w+\.md", navigation))
    assert named == {f"{language}/{page.name}" for language in LANGUAGES for page in pages_of(language)[1:]}


@pytest.mark.parametrize("readme", READMES.values())
def test_a_readme_has_at_most_200_lines(readme: str) -> None:
    assert len((ROOT / readme).read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_key_in_a_page_exists(page: Path) -> None:
    assert [key for key in sorted(keys_in(page.read_text())) if not is_key(key)] == []


def test_a_key_that_is_not_there_is_found() -> None:
    text = "`trainer.val_frequency`\n```bash\nverl worker.rollout.val_override_config.n=4 data.batch=3\n```\n"
    text += "```yaml\nworker:\n  actor: {lora_rank: 3, optim: {lr: 1.0}}\n```\n"
    unknown = ["data.batch", "trainer.val_frequency", "worker.actor.lora_rank"]
    assert [key for key in sorted(keys_in(text)) if not is_key(key)] == unknown


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=relative)
def test_every_file_that_code_in_a_page_names_exists(page: Path) -> None:
    places = [ROOT, ROOT / "scripts", ROOT / "examples"]
    files = sorted(named_files(page.read_text()))
    assert [file for file in files if not any((place / file).exists() for place in places)] == []


def test_files_are_found_in_code() -> None:
    text = "`bash examples/gone.sh`, `vgr.sh`, `examples/SCRIPT.sh`, /home/me/verl/a.json\n"
    text += "```\npython scripts/a.py b\n```\n"
    assert named_files(text) == {"examples/gone.sh", "vgr.sh", "scripts/a.py"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_migration_table_names_every_old_key_with_its_new_one(language: str) -> None:
    rows = [row for table in tables_of(language) for row in table.splitlines()]
    renamed = {old: key.moved_to for old, key in _retired_keys().items() if key.moved_to}
    assert renamed
    for old, new in renamed.items():
        assert any(f"`{old}`" in row and f"`{new}`" in row for row in rows), f"{old} is read as {new}"
