"""A hook of mkdocs: links that leave docs/ (`../benchmarks/x.md`, `../bd3_scale/x.py`) lead to copies inside of the site, and lists
that follow a paragraph at once are lists, as where the repository is read.

The pages are read in the repository as well, where such links are relative paths. In the site Markdown files become pages, pictures stay,
and everything else is a text file. Invariant: a link to a file that does not exist is a warning, which `--strict` makes an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "repository"
OUTSIDE = re.compile(r"(?<=\]\()((?:\.\./)+)([^)#\s]+)")
LIST = re.compile(r"^((?![-|\s]|\d+\. ).*\S)\n(?=(?:-|1\.) )", re.MULTILINE)
"""A line of a paragraph, a list behind it: Python's Markdown wants an empty line between them."""
SHOWN_AS_THEY_ARE = {".md", ".png"}


def _place(path: str) -> str:
    """Where the file `path` of the repository lies in the site's sources."""
    return f"{FOLDER}/{path}" if Path(path).suffix in SHOWN_AS_THEY_ARE else f"{FOLDER}/{path}.txt"


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to outside of docs/, and the pictures and neighbours that those name in turn."""
    waiting = [(page.content_string, ROOT / "docs") for page in files.documentation_pages()]
    known: set[Path] = set()
    while waiting:
        text, folder = waiting.pop()
        for target in re.findall(r"\]\(([^)#\s:]+)\)", text):
            path = (folder / target).resolve()
            if path in known or not path.is_file() or not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "docs"):
                continue
            known.add(path)
            files.append(File.generated(config, _place(str(path.relative_to(ROOT))), abs_src_path=str(path)))
            if path.suffix == ".md":
                waiting.append((path.read_text(), path.parent))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Lead the links of a page of docs/ into the copies, and part lists from paragraphs."""
    markdown = LIST.sub(r"\1\n\n", markdown)
    if page.file.src_uri.startswith(FOLDER):
        return markdown
    return OUTSIDE.sub(lambda match: _place(match[2]), markdown)
