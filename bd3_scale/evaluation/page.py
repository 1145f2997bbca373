"""What an evaluation of generation leaves behind: samples.jsonl, summary.json, lengths.png and a page to read it all.

The page shows texts of several systems side by side, the same numbers of each on top. Invariant: everything on it comes from
the files of the folders that it shows, so that it can be made again from them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bd3_scale.errors import DataError
from bd3_scale.evaluation.generation import Text
from bd3_scale.reporting.plots import empty_figure

SAMPLES, SUMMARY, LENGTHS, PAGE = "samples.jsonl", "summary.json", "lengths.png", "page.html"
SHOWN = 20
"""Texts of each system on the page."""
ROWS = {
    "samples": "texts",
    "empty": "of these empty",
    "length_median": "median length, tokens",
    "length_max": "longest",
    "nfe": "network calls per text (of its batch)",
    "entropy": "entropy of a text's tokens, nats",
    "generative_perplexity": "generative perplexity, mean over texts",
    "generative_perplexity_pooled": "the same, all tokens pooled",
    "judge": "judge",
}
_STYLE = "body{font:14px sans-serif}td,th{vertical-align:top;border:1px solid #ccc;padding:6px;text-align:left}td{white-space:pre-wrap}"


def write_results(folder: Path, texts: Sequence[Text], document: dict[str, Any], beside: Sequence[Path] = ()) -> None:
    """Make `folder` with all files; `beside`: folders of earlier evaluations to be shown on its page too. Raises DataError."""
    others = [(other.name, *read_results(other)) for other in beside]
    try:
        folder.mkdir(parents=True)
        (folder / SAMPLES).write_text("".join(text.line() for text in texts), encoding="utf-8")
        (folder / SUMMARY).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _histogram([text.length for text in texts]).savefig(folder / LENGTHS, dpi=100)
        (folder / PAGE).write_text(page([(folder.name, document, [text.text for text in texts]), *others]), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); name another --output") from None


def page(systems: Sequence[tuple[str, dict[str, Any], Sequence[str]]]) -> str:
    """An HTML page of (name, summary, texts) of each system."""

    def line(head: str, cells: Sequence[str]) -> str:
        return f"<tr><th>{html.escape(head)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"

    numbers = [line(head, [_shown(document.get(key)) for _, document, _ in systems]) for key, head in ROWS.items()]
    most = min(SHOWN, max(len(texts) for _, _, texts in systems))
    texts = [line(f"text {row}", [texts[row] if row < len(texts) else "" for _, _, texts in systems]) for row in range(most)]
    heads = "".join(f"<th>{html.escape(name)}</th>" for name, _, _ in systems)
    return (
        f'<!doctype html><meta charset="utf-8"><title>Generated texts</title><style>{_STYLE}</style>'
        f"<table><tr><th></th>{heads}</tr>{''.join(numbers)}{''.join(texts)}</table>\n"
    )


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def read_results(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Summary and texts of what `write_results` left in `folder`. Raises DataError."""
    try:
        document = json.loads((folder / SUMMARY).read_text("utf-8"))
        texts = [json.loads(line)["text"] for line in (folder / SAMPLES).read_text("utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: holds no {SUMMARY} and {SAMPLES} of `evaluate generation`; give --beside another folder") from None
    return document, texts


def _histogram(lengths: Sequence[int]) -> Any:
    figure = empty_figure(6, 4)
    axes = figure.add_subplot()
    axes.hist(lengths, bins=30)
    axes.set(xlabel="length (tokens)", ylabel="texts", title=f"{len(lengths)} texts")
    return figure
