"""Hooks of mkdocs: pages made of files outside `docs/`, and the reference of the command line from the commands' help.

The links of the pages are those that work in the repository; where they leave `docs/` they are rewritten for the site.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# file of the repository: page of the site
PAGES = {
    "benchmarks/RESULTS.md": "benchmarks/results.md",
    "benchmarks/MIXTURES.md": "benchmarks/mixtures.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
# page of the site in place of a file that is none of its pages
INSTEAD = {"README.md": "index.md"}
COMMANDS = "<!-- reference of the commands -->"
NAMES = "<!-- public names -->"
SUPPORT = "<!-- support matrix of the README -->"
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are files of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in the commands, and rewrite relative links that leave `docs/`."""
    uri = page.file.src_uri
    source = next((file for file, at in PAGES.items() if at == uri), f"docs/{uri}")
    markdown = LINK.sub(lambda match: _rewritten(match, source, uri), markdown)
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_line())
    if NAMES in markdown:
        markdown = markdown.replace(NAMES, public_names())
    if SUPPORT in markdown:
        table = LINK.sub(lambda match: _rewritten(match, "README.md", uri), support_matrix())
        markdown = markdown.replace(SUPPORT, table)
    return markdown


def _rewritten(match: re.Match[str], source: str, uri: str) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
    if target.startswith("docs/"):
        at = target.removeprefix("docs/")
    else:
        at = {**PAGES, **INSTEAD}[target]
    return f"{match[1]}{posixpath.relpath(at, posixpath.dirname(uri) or '.')}{match[3] or ''}{match[4]}"


def public_names() -> str:
    """`hasten.__all__` as a list of the pages of the API reference, with links to the entries."""
    import hasten

    modules = {
        entry: page
        for page in sorted((ROOT / "docs" / "api").glob("*.md"))
        for entry in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    }
    names: dict[Path, list[str]] = {page: [] for page in modules.values()}
    for name in sorted(hasten.__all__, key=str.lower):
        public = getattr(hasten, name)
        if isinstance(public, ModuleType):  # hasten.plan and hasten.pick are modules that can be called
            public = getattr(public, name)
        dotted = f"{public.__module__}.{public.__name__}"
        entry = max((entry for entry in modules if dotted.startswith(f"{entry}.")), key=len)
        names[modules[entry]].append(f"[`{name}`]({modules[entry].name}#{dotted})")
    lines = []
    for page, links in names.items():
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({page.name})" + (f": {', '.join(links)}" if links else ""))
    return "\n".join(lines)


def support_matrix() -> str:
    """What stands between the marks of the README."""
    text = (ROOT / "README.md").read_text()
    return text[text.index("[start:support] -->") : text.index("<!-- [end:support]")].partition("-->")[2]


def command_line() -> str:
    """The help of every command, as Markdown, without its own title and table of contents."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from hasten.cli.app import app

    text = app().generate_docs(output_format="markdown")
    return text[text.index("## hasten sample") :]
