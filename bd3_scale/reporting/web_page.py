"""RUN_DIR/report/index.html: one page of a run that is opened from a disk, without a server, a script or a network.

It is made from metrics.jsonl, the recipe and report/samples.json, beside the pictures of `plots` and at the same moments, and shows
them with the numbers that a person asks first: where the run is, what it reached, how fast, on how many ranks, with how much memory, what
it writes, where the time went and what it warned of.
Invariants: every text is escaped; nothing is loaded from elsewhere; it reads on a light and on a dark screen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bd3_scale.errors import one_line, without_credentials
from bd3_scale.messages import log
from bd3_scale.recipe import Recipe, to_yaml
from bd3_scale.reporting.metrics import read_metrics
from bd3_scale.reporting.samples import Sample, keep, kept

Lines = Sequence[Mapping[str, Any]]
STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #57606a; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --line: #30363d; --soft: #9198a1; --card: #161b22; }
  body { background: #0d1117; color: #e6edf3; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: .75rem; margin: 1rem 0; }
.card, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; overflow: auto; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 1rem; }
img { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .9rem .2rem 0; text-align: left; }
"""
SHOWN_VALIDATIONS = 20


def write_page(recipe: Recipe, world_size: int, lines: Lines, folder: Path) -> Path:
    """Write index.html beside the pictures and samples in `folder`, whole or not at all. Returns the file."""
    train = [line for line in lines if line["kind"] == "train"]
    validations = [line for line in lines if line["kind"] == "validation"]
    parts = [f"<h1>{escape(recipe.run.name)}</h1>", f'<p class="soft">{escape(_place(recipe, world_size, lines))}</p>']
    parts.append(_cards(_numbers(recipe, train, validations)))
    parts.append('<div class="pictures">')
    parts += [f'<img src="{escape(picture.name)}" alt="{escape(picture.stem)}">' for picture in sorted(folder.glob("*.png"))]
    parts.append("</div>")
    step, samples = kept(folder)
    for title, table in (
        (f"Samples of step {step:,}", _samples(samples)),
        ("Validation", _validations(validations)),
        ("Where the time went", _spent(validations)),
        ("Seconds of a step that ranks compute by themselves", _own(train)),
    ):
        parts += [f"<h2>{title}</h2>", table] if table else []
    if warnings := [line for line in lines if line["kind"] in ("warning", "amendment")]:
        parts += ["<h2>Warnings and changes</h2>", _table(("step", "what"), [(line["step"], _text(line)) for line in warnings])]
    parts += ["<h2>Recipe</h2>", f"<pre>{escape(without_credentials(to_yaml(recipe)))}</pre>"]
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(recipe.run.name)}</title><style>{STYLE}</style>\n'
    beside, page = folder / ".index.html", folder / "index.html"
    beside.write_text(head + "\n".join(parts) + "\n</html>\n", "utf-8")
    return beside.replace(page)


def add_samples(recipe: Recipe, world_size: int, samples: list[Sample]) -> None:
    """Keep what a run ended with, and make its page once more, with them. Like all that is only shown it stops nothing."""
    folder = Path(recipe.run.dir)
    try:
        keep(samples, recipe.total_steps, folder / "report")
        if recipe.tracking.plots:
            write_page(recipe, world_size, read_metrics(folder / "metrics.jsonl"), folder / "report")
    except Exception as error:
        log.warning(f"no samples in {folder / 'report'} ({type(error).__name__}: {one_line(error)}); make some with bd3 sample {folder}")


def _place(recipe: Recipe, world_size: int, lines: Lines) -> str:
    parallel, step = recipe.parallel, max((line["step"] for line in lines), default=0)
    replicas = world_size // (parallel.tensor * parallel.context * parallel.pipeline)
    context = f"context {parallel.context} x " if parallel.context > 1 else ""
    layout = f"tensor {parallel.tensor} x {context}pipeline {parallel.pipeline} x data {replicas}"
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    return f"step {step:,} of {recipe.total_steps:,} on {ranks}: {layout}, ZeRO {parallel.zero} ({parallel.resolved_engine})"


def _numbers(recipe: Recipe, train: Lines, validations: Lines) -> dict[str, str]:
    """What stands on top: {name: value}."""
    found: dict[str, str] = {}
    if validations:
        last, score = validations[-1], "perplexity" if "perplexity" in validations[-1] else "cross_entropy"
        best = min((line for line in validations if _known(line.get(score))), key=lambda line: line[score], default=last)
        found |= {f"validation {score.replace('_', '-')}": _shown(last[score]), f"best (step {best['step']:,})": _shown(best[score])}
    if train:
        last = train[-1]
        found |= {"train loss": _shown(last["loss"]), "data tokens": f"{last['data_tokens']:,}"}
        found |= {"data tokens/s": f"{last['tokens_per_second']:,.0f}", "memory": f"{last['memory_bytes'] / 2**30:.2f} GiB"}
        if last.get("mfu") is not None:
            found["MFU"] = f"{last['mfu']:.1%}"
        left_out = last.get("skipped_steps", 0)
        found |= {"steps left out": f"{left_out:,}"} if left_out else {}
    interval = next((line["interval"] for line in reversed(train) if "interval" in line), None)
    if interval is not None and recipe.objective.traits.has_interval:
        found["interval of t"] = f"[{interval[0]:g}, {interval[1]:g}]"
    return found


def _validations(lines: Lines) -> str:
    keys = [key for key in ("nelbo", "standard_error", "perplexity", "cross_entropy", "rows") if lines and key in lines[-1]]
    return _table(("step", *keys), [(f"{line['step']:,}", *(_shown(line.get(key)) for key in keys)) for line in lines[-SHOWN_VALIDATIONS:]])


def _samples(samples: Sequence[Sample]) -> str:
    one = '<p class="soft">{} tokens, ended by {}</p><pre>{}</pre>'
    return "\n".join(one.format(sample.tokens, escape(sample.stop.replace("_", " ")), escape(sample.text)) for sample in samples)


def _spent(validations: Lines) -> str:
    """Of the leader, over all starts up to the last validation: what is named is counted, the rest is the steps."""
    spent = Counter[str]()
    for line in validations:
        spent.update(line.get("spent", {}))
    if not spent:
        return ""
    whole = max(validations[-1]["seconds"], 1e-9)
    shares = {"steps": whole - sum(spent.values()), **spent}
    return _table(("what", "seconds", "share"), [(what, f"{value:,.1f}", f"{value / whole:.1%}") for what, value in shares.items()])


def _own(train: Lines) -> str:
    """Over all ranks, of the last line that says so (see `fault_tolerance.pace`)."""
    own: Mapping[str, float] = next((line["own_seconds"] for line in reversed(train) if line.get("own_seconds")), {})
    return _table(("what", "seconds"), [(name.replace("_", " "), _shown(value)) for name, value in own.items()])


def _text(line: Mapping[str, Any]) -> str:
    return str(line["text"]) if "text" in line else f"{line['key']} is {line['now']}, {line['before']} before"


def _cards(values: Mapping[str, str]) -> str:
    one = '<div class="card"><span class="soft">{}</span><b>{}</b></div>'
    cards = "".join(one.format(escape(name), escape(value)) for name, value in values.items())
    return f'<div class="cards">{cards}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    cells = ["".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in head)]
    cells += ["".join(f"<td>{escape(str(value))}</td>" for value in row) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else "-" if value is None else str(value)
