"""What a table of the paper leaves behind: Markdown, JSON and a plot, ours beside the paper's.

Invariants: the files of a table are those of one call and of its date; the JSON has every number of the Markdown, and how it was made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """What a table says."""

    rows: list[dict[str, Any]]
    text: list[str]
    """Markdown, line by line, below the heading."""
    figure: Any
    more: dict[str, Any] = field(default_factory=dict)
    """Further entries of the JSON."""


def number(value: float | None, form: str = "#.4g") -> str:
    """A cell; "-" where there is no number."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def with_error(value: float | None, error: float | None) -> str:
    """A cell such as `31.20 +- 0.12`."""
    return number(value) if error is None or math.isnan(error) else f"{number(value)} +- {number(error, '.3g')}"


def cells(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, between empty lines."""
    return ["", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(line)} |" for line in lines), ""]


def logarithmic(axis: Any, *ticks: float) -> None:
    """A logarithmic axis with plain numbers: at `ticks`, or at 1, 2, 5, 10, ... where none are named."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(FixedLocator(sorted(set(ticks))) if ticks else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def write(name: str, table: Table, folder: Path, about: dict[str, Any]) -> Path:
    """DATE-reproduce-NAME.{md,json,png} in `folder`; `about`: date, commit, command, machine, budget. Returns the Markdown's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{about['date']}-reproduce-{name}"
    table.figure.savefig(stem.with_suffix(".png"), dpi=90)
    stem.with_suffix(".json").write_text(json.dumps({"name": name, **about, **table.more, "rows": table.rows}, indent=1) + "\n")
    machine = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    head = [
        f"# reproduce: {name}, {about['date']}",
        "",
        f"Commit {about['commit']}; `{about['command']}`; every system trained for {about['budget']}. Machine: {machine}.",
        "",
    ]
    text = "\n".join([*head, *table.text, "", f"![{name}]({stem.with_suffix('.png').name})", ""])
    stem.with_suffix(".md").write_text(text.replace("\n\n\n", "\n\n"))
    return stem.with_suffix(".md")
