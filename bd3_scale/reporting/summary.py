"""The last words of a run: what was reached, where it lies, how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bd3_scale.recipe import Recipe
from bd3_scale.reporting.metrics import read_metrics
from bd3_scale.tuning.estimates import CrossEntropy, Validated, Validation


def summary(recipe: Recipe, *, step: int, checkpoint: Path, validated: Validated | None, unigram: float | None, stopped: str | None) -> str:
    """Text for people. `validated` and `unigram` of this start; where it made none, those in metrics.jsonl count."""
    folder = checkpoint.parent.parent
    tokens = recipe.tokens_before(step)
    lines = [
        "",
        f"{'stopped by ' + stopped + ' after' if stopped else 'finished:'} {step} of {recipe.total_steps} steps, {tokens:,} data tokens",
    ]
    history = _validations(folder / "metrics.jsonl")
    if history:
        last, best = history[-1], min(history, key=_loss)
        kind = Validation if "nelbo" in last else CrossEntropy
        validated = validated or kind(**{field.name: last[field.name] for field in fields(kind)})
        unigram = last.get("unigram_perplexity") if unigram is None else unigram
    if validated is not None:
        at = f" at step {last['step']}" if history and last["step"] != step else ""
        lines.append(f"validation  {_score(vars(validated))} on {validated.rows} held-out rows{at}")
        if history and _loss(best) < _loss(vars(validated)):
            lines.append(f"best        {_score(best)} at step {best['step']}")
        if unigram is not None and isinstance(validated, Validation):
            share = validated.perplexity / unigram
            lines.append(f"unigram     perplexity {unigram:.2f} of the same rows; the model's is {share:.2f} of it")
    lines += [
        f"checkpoint  {checkpoint}",
        f"metrics     {folder / 'metrics.jsonl'}, plots in {folder / 'report'}",
        f"sample      bd3 sample {shlex.quote(str(folder))}",
    ]
    if stopped:
        lines.append("continue    the same command again")
    return "\n".join(lines)


def _validations(path: Path) -> list[dict[str, Any]]:
    """Validation lines with a number for their loss."""
    lines = read_metrics(path) if path.is_file() else []
    return [line for line in lines if line.get("kind") == "validation" and isinstance(_loss(line), float)]


def _loss(values: Mapping[str, Any]) -> Any:
    """The NELBO, or the cross-entropy of an objective that has none."""
    return values.get("nelbo", values.get("cross_entropy"))


def _score(values: Mapping[str, Any]) -> str:
    if "nelbo" not in values:
        return f"cross-entropy {values['cross_entropy']:.4f} +- {values['standard_error']:.4f} nats per data token (no likelihood)"
    return f"perplexity {values['perplexity']:.2f} (NELBO {values['nelbo']:.4f} +- {values['standard_error']:.4f} nats per data token)"
