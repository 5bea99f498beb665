"""Hooks of the site generator: pictures and files of bench/ are linked as on the repository's own pages."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./(bench/[^)\s]+\.(?:png|json|md|jsonl))\)")
HOME = re.compile(r"\]\(docs/([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to outside of docs/."""
    linked = {name for page in files.documentation_pages() for name in LINK.findall(page.content_string)}
    for name in sorted(linked):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links out of docs/ become links to the files that `on_files` added."""
    return LINK.sub(r"](\1)", markdown)
