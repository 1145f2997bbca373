"""The last words of a run: what was reached, where it lies, how to go on, and a sample of its text."""

from __future__ import annotations

from pathlib import Path

from bd3_scale.config import Recipe
from bd3_scale.runtime.validation import Validation


def summary(
    recipe: Recipe, *, step: int, checkpoint: Path, validated: Validation | None, unigram: float | None, stopped: str | None
) -> str:
    """Text for people."""
    folder = checkpoint.parent.parent
    tokens = step * recipe.tokens_per_step
    lines = [
        "",
        f"{'stopped by ' + stopped + ' after' if stopped else 'finished:'} {step} of {recipe.total_steps} steps, {tokens:,} data tokens",
    ]
    if validated is not None:
        lines.append(
            f"validation  perplexity {validated.perplexity:.2f} (NELBO {validated.nelbo:.4f} +- {validated.standard_error:.4f} nats "
            f"per data token, {validated.rows} held-out rows)"
        )
        if unigram is not None:
            share = validated.perplexity / unigram
            lines.append(f"unigram     perplexity {unigram:.2f} of the same rows; the model's is {share:.2f} of it")
    lines += [
        f"checkpoint  {checkpoint}",
        f"metrics     {folder / 'metrics.jsonl'}, plots in {folder / 'report'}",
        f"sample      python -m bd3_scale.sample {folder}",
    ]
    if stopped:
        lines.append("continue    the same command again")
    return "\n".join(lines)


def sample_text(checkpoint: Path, recipe: Recipe, device: str) -> str:
    """Text from the checkpoint just written, as `python -m bd3_scale.sample` makes it."""
    from bd3_scale.checkpoint.network import load_network
    from bd3_scale.sample import generate_tokens

    loaded = load_network(checkpoint, device=device)
    result = generate_tokens(loaded, batch=1, length=recipe.tracking.sample_tokens, seed=recipe.run.seed)
    return loaded.tokenizer.decode(result.tokens[0][1:])
