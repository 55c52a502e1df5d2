# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does beside its configuration: README, and what pages show of examples/, become part of the site.

Links are written for readers of the repository. On the site everything lies one folder higher, without `docs/`.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("*.md", "examples/*.png", "examples/*.svg", "examples/reward_function/*.py")
"""Files beside docs/ that pages may link to. README is the first page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the repository's relative links into the site's."""
    if "/" in page.file.src_uri:
        return markdown.replace("](../../", "](../")
    return markdown.replace("](docs/", "](")
