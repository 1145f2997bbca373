"""The page of a run: whole without a network, everything escaped, and what a browser shows of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bd3_scale.recipe import load
from bd3_scale.reporting.samples import Sample, keep
from bd3_scale.reporting.web_page import write_page

LINES = [
    {"kind": "train", "step": 10, "data_tokens": 1000, "loss": 3.5, "tokens_per_second": 1234.5, "memory_bytes": 2**30, "mfu": None,
     "interval": [0.3, 0.8], "skipped_steps": 2, "own_seconds": {"least": 0.1, "median": 0.2, "most": 0.3}},
    {"kind": "validation", "step": 10, "data_tokens": 1000, "nelbo": 3.0, "standard_error": 0.1, "perplexity": 20.0855, "rows": 8,
     "seconds": 10.0, "spent": {"validation": 1.0}},
    {"kind": "validation", "step": 20, "data_tokens": 2000, "nelbo": "nan", "standard_error": 0.1, "perplexity": "nan", "rows": 8,
     "seconds": 20.0, "spent": {"validation": 1.5, "checkpoints": 0.5}},
    {"kind": "warning", "step": 12, "text": "<script>alert(1)</script>"},
    {"kind": "amendment", "step": 15, "key": "run.seed", "now": 2, "before": 1},
]  # fmt: skip


class Seen(HTMLParser):
    """Every tag, and the text outside of styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def page(base: Path, folder: Path) -> Path:
    recipe = load(base, ["run.name=a <run>", "parallel.tensor=2", "checkpoint.remote=s3://key:secret@bucket/run"])
    (folder / "loss.png").touch()
    keep([Sample("<i>A text</i> of the model", 12, "end_of_text"), Sample("Another", 16, "length")], 20, folder)
    return write_page(recipe, 8, LINES, folder)


def test_a_page_is_whole_escaped_and_alone(base: Path, tmp_path: Path) -> None:
    text = page(base, tmp_path).read_text("utf-8")
    seen = Seen()
    seen.feed(text)
    tags = {tag for tag, _ in seen.tags}
    assert not tags & {"script", "link", "iframe", "run", "i"} and "secret" not in text and "a &lt;run&gt;" in text
    assert [attributes["src"] for tag, attributes in seen.tags if tag == "img"] == ["loss.png"]
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//|url\(|@import", text)
    for shown in (
        "tensor 2 x pipeline 1 x data 4",
        "1,234",
        "1.00 GiB",
        "[0.3, 0.8]",
        "20.09",
        "best (step 10)",
        "run.seed is 2, 1 before",
        "Samples of step 20",
        "12 tokens, ended by end of text</p><pre>&lt;i&gt;A text&lt;/i&gt; of the model</pre>",
        "<td>validation</td><td>2.5</td><td>12.5%</td>",
        "<td>steps</td><td>17.0</td><td>85.0%</td>",
    ):
        assert shown in text, shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here: the page is not opened in a browser")
def test_a_browser_shows_it(base: Path, tmp_path: Path) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    shown = subprocess.run([*command, page(base, tmp_path).as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<h2>Validation</h2>" in shown and "alert(1)" in shown and "<script" not in shown
