"""Pictures of a run, made from nothing but its metrics.jsonl: they can be made again at any time, for several runs at once.

Invariant: train loss and validation are never in one picture, since they are different numbers; what a line does not
hold (an unknown MFU, a loss that is not a number) leaves a gap and stops nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = Sequence[Mapping[str, Any]]
SMOOTH_FROM = 200
"""Points from which a curve is drawn pale, with its running mean (over a fiftieth of them) on top."""


def draw(runs: Mapping[str, Lines], folder: Path) -> list[Path]:
    """Write loss.png, perplexity.png, cross_entropy.png (of runs without a perplexity), the same of every other validation set,
    throughput.png and tuner.png of the named runs into `folder`; what has no data is left out.

    Returns the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "loss.png": _figure(runs, "train", "loss", "train loss (nats per data token)"),
        "perplexity.png": _figure(runs, "validation", "perplexity", "validation perplexity"),
        "cross_entropy.png": _figure(runs, "validation", "cross_entropy", "validation cross-entropy (nats; no likelihood)"),
        **_of_sets(runs),
        "throughput.png": _figure(runs, "train", "tokens_per_second", "data tokens per second"),
        "tuner.png": _tuner_figure(runs),
    }
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            written.append(folder / name)
    return written


def _by_block_size(runs: Mapping[str, Lines]) -> dict[str, Lines]:
    """The runs, those with a mixture of block sizes once for each, with what was measured of that."""
    found: dict[str, Lines] = {}
    for name, lines in runs.items():
        sizes = sorted({size for line in lines for size in line.get("block_sizes", ())}, key=int)
        for size in sizes:
            found[f"{name}, L' = {size}"] = [{**line, **line.get("block_sizes", {}).get(size, {})} for line in lines]
        if not sizes:
            found[name] = lines
    return found


def _of_sets(runs: Mapping[str, Lines]) -> dict[str, Any]:
    """{file: figure} of the sets of `validation.sets`, one each."""
    kinds = sorted({str(line.get("kind")) for lines in runs.values() for line in lines if str(line.get("kind")).startswith("validation/")})
    figures = {}
    for kind in kinds:
        name = kind.removeprefix("validation/")
        figures[f"perplexity_{name}.png"] = _figure(runs, kind, "perplexity", f"perplexity of {name}")
        figures[f"cross_entropy_{name}.png"] = _figure(runs, kind, "cross_entropy", f"cross-entropy of {name} (nats; no likelihood)")
    return figures


def series(lines: Lines, kind: str, key: str) -> tuple[list[float], list[float]]:
    """(data tokens, values) of the lines of a kind that have a number under `key`."""
    points = [(line["data_tokens"], line[key]) for line in lines if line.get("kind") == kind and _number(line.get(key))]
    return [x for x, _ in points], [y for _, y in points]


def _figure(runs: Mapping[str, Lines], kind: str, key: str, label: str) -> Any:
    from matplotlib.ticker import EngFormatter

    measured = _by_block_size(runs) if kind.startswith("validation") else runs
    curves = {name: series(lines, kind, key) for name, lines in measured.items()}
    if not any(x for x, _ in curves.values()):
        return None
    figure = empty_figure(7, 4.5)
    axes = figure.add_subplot()
    for index, (name, (x, y)) in enumerate(curves.items()):
        color = f"C{index % 10}"
        if kind.startswith("validation"):
            axes.plot(x, y, color=color, label=name, marker="o", markersize=4)
        elif len(y) < SMOOTH_FROM:
            axes.plot(x, y, color=color, label=name)
        else:
            axes.plot(x, y, color=color, alpha=0.25)
            axes.plot(x, running_mean(y, len(y) // 50), color=color, label=name)
    if key == "perplexity":  # lines of other sets have no unigram model
        for index, (name, lines) in enumerate(runs.items()):
            unigram = next(
                (line["unigram_perplexity"] for line in lines if line["kind"] == kind and _number(line.get("unigram_perplexity"))), None
            )
            if unigram is not None:
                name_of_line = f"unigram model{f' ({name})' if len(runs) > 1 else ''}"
                axes.axhline(unigram, linestyle="--", color=f"C{index % 10}", label=name_of_line)
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda value, place: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("data tokens")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place (of fewer at the start)."""
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tuner_figure(runs: Mapping[str, Lines]) -> Any:
    """Of each run: the variance of every candidate interval over (beta, omega) at its last tuning, and the path of the choice."""
    from matplotlib.colors import LogNorm

    tuned: dict[str, list[Mapping[str, Any]]] = {}
    for name, lines in runs.items():
        for line in (line for line in lines if line.get("kind") == "tuner"):
            tuned.setdefault(f"{name}, L' = {line['block_size']}" if "block_size" in line else name, []).append(line)
    if not tuned:
        return None
    figure = empty_figure(6 * len(tuned), 5)
    for axes, (name, lines) in zip(figure.subplots(1, len(tuned), squeeze=False)[0], tuned.items(), strict=True):
        points = [(*item["interval"], item["variance"]) for item in lines[-1]["variances"] if _number(item["variance"])]
        if points:
            beta, omega, variance = zip(*points, strict=True)
            positive = min(variance) > 0
            image = axes.scatter(beta, omega, c=variance, s=260, marker="s", cmap="viridis_r", norm=LogNorm() if positive else None)
            figure.colorbar(image, ax=axes, label="variance of a block's loss")
        chosen = [line["interval"] for line in lines]
        axes.plot([x for x, _ in chosen], [y for _, y in chosen], color="crimson", marker="o", markersize=5, label="chosen")
        axes.set_xlabel("beta")
        axes.set_ylabel("omega")
        axes.set_title(f"{name}, step {lines[-1]['step']}")
        axes.legend(loc="lower right")
    return figure


def empty_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches on the Agg canvas, whose axes make room for their labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
