"""Pictures of a run, made from nothing but its metrics.jsonl: they can be made again at any time, for several runs at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]


def draw(runs: Mapping[str, Lines], folder: Path) -> list[Path]:
    """Write loss.png, perplexity.png and throughput.png of the named runs into `folder`; what has no data is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _plot(runs, folder / "loss.png", "train", "loss", "train loss (nats per data token)"),
        _plot(runs, folder / "perplexity.png", "validation", "perplexity", "validation perplexity", log=True, marker="o"),
        _plot(runs, folder / "throughput.png", "train", "tokens_per_second", "data tokens per second"),
    ]
    return [path for path in written if path is not None]


def _plot(
    runs: Mapping[str, Lines], path: Path, kind: str, key: str, label: str, log: bool = False, marker: str | None = None
) -> Path | None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = {
        name: [(line["data_tokens"], line[key]) for line in lines if line.get("kind") == kind and isinstance(line.get(key), (int, float))]
        for name, lines in runs.items()
    }
    if not any(series.values()):
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=name)
    if key == "perplexity":
        for name, lines in runs.items():
            unigram = next((line["unigram_perplexity"] for line in lines if "unigram_perplexity" in line), None)
            if unigram is not None:
                axes.axhline(unigram, linestyle="--", color="grey", label=f"unigram of {name}" if len(runs) > 1 else "unigram")
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("data tokens")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path
