"""Hooks of mkdocs: pages made of files outside `docs/`, and the reference of the command line from the commands' help.

The links of the pages are those that work in the repository; where they leave `docs/` they are rewritten for the site.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# file of the repository: page of the site
PAGES = {
    "benchmarks/RESULTS.md": "benchmarks/results.md",
    "benchmarks/MIXTURES.md": "benchmarks/mixtures.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
}
COMMANDS = "<!-- reference of the commands -->"
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are files of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in the commands, and rewrite relative links that leave `docs/`."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_line())
    uri = page.file.src_uri
    source = next((file for file, at in PAGES.items() if at == uri), f"docs/{uri}")
    return LINK.sub(lambda match: _rewritten(match, source, uri), markdown)


def _rewritten(match: re.Match[str], source: str, uri: str) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
    if target.startswith("docs/"):
        at = target.removeprefix("docs/")
    elif target in PAGES:
        at = PAGES[target]
    else:  # of a file that is no page, its name
        return f"{match[1]}{match[2]}{match[3] or ''}{match[4]}"
    return f"{match[1]}{posixpath.relpath(at, posixpath.dirname(uri) or '.')}{match[3] or ''}{match[4]}"


def command_line() -> str:
    """The help of every command, as Markdown, without its own title and table of contents."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from hasten.cli.app import app

    text = app().generate_docs(output_format="markdown")
    return text[text.index("## hasten sample") :]
