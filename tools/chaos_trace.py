"""What chaos.py looks at: the samples and noise of every rank, written down inside it, and the comparison with the reference.

Invariants: the product knows nothing of this, what it takes for a step is written down in the rank's own process, after the product's
handlers of signals are in place; records are whole lines whenever a rank is killed; nothing here knows rounds, signals or layouts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUMBERS = {
    "train": ("loss", "gradient_norm", "learning_rate", "interval"),
    "validation": ("nelbo", "cross_entropy", "standard_error"),
    "tuner": ("interval", "variance", "variances"),
}
"""What is compared of each kind of line of metrics.jsonl, where the objective has it."""
TOLERANCE = 1e-5


# -- In a rank: what it trains on is written down ----------------------------------------------------------------------


def rank_main(trace: Path, arguments: list[str]) -> int:
    """`bd3_scale.train` with every batch and its noise appended to `trace`. Nothing is imported before the command itself would."""
    from bd3_scale import train

    load, run = train.recipes.load, train.run

    def load_and_say(*given: Any, **named: Any) -> Any:
        trace.touch()  # from here on the process is the product's
        return load(*given, **named)

    def run_and_trace(*given: Any) -> None:
        from bd3_scale.fault_tolerance import run_owner

        run_owner.BEAT = 0.2  # runs are short here: a second job must see a sign of life before they end
        write_down(trace)
        run(*given)

    for where, name, wrapper in ((train.recipes, "load", load_and_say), (train, "run", run_and_trace)):
        setattr(where, name, wrapper)
    return train.main(arguments)


def write_down(path: Path) -> None:
    """Wrap what this process takes for each step: inputs that were made ahead and never taken are not trained on."""
    import numpy as np

    from bd3_scale.training.feed import Feed

    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def digest(*arrays: Any) -> str:
        return hashlib.blake2b(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays), digest_size=8).hexdigest()

    def append(*record: Any) -> None:
        os.write(file, (json.dumps(record) + "\n").encode())  # one write: a kill leaves whole lines

    def seen(inputs: Any, index: int) -> str:
        length = inputs.pattern.scored_rows
        selected, weights = inputs.selected.numpy(), inputs.weights.numpy()
        own = (selected // length == index) & (weights != 0)  # weight 0: padding
        told = () if inputs.noise_levels is None else (inputs.noise_levels[index],)
        words = () if inputs.simplex is None else (inputs.simplex.keys[index], inputs.simplex.signal[index])
        return digest(inputs.tokens[index], selected[own] % length, weights[own], inputs.dropout_keys[index], *told, *words)

    original = Feed.take

    def take(self: Any, step: int, samples: int) -> Any:
        taken = original(self, step, samples)
        for batch, inputs in zip(taken.micro_batches, taken.inputs, strict=True):
            slots = batch.slots[: batch.real].tolist()  # what follows is filler
            append("rows", samples, slots, [digest(row) for row in batch.rows[: batch.real]])
            append("noise", step, slots, [seen(inputs, index) for index in range(batch.real)])
        return taken

    Feed.take = take  # type: ignore[method-assign]


@dataclass
class Trace:
    """What the ranks of one attempt wrote down. Keys: (step before the update, slot)."""

    seen: dict[str, dict[tuple[int, int], set[str]]] = field(default_factory=lambda: {"rows": defaultdict(set), "noise": defaultdict(set)})
    times: Counter[tuple[int, int]] = field(default_factory=Counter)
    """By how many ranks it was trained."""
    last: list[int] = field(default_factory=list)
    """Of every rank: the last step that it began; -1: none."""

    @classmethod
    def read(cls, paths: Sequence[Path], global_batch: int) -> Trace:
        trace = cls()
        for path in paths:
            last = -1
            for text in path.read_text().splitlines() if path.exists() else []:
                kind, number, slots, digests = json.loads(text)
                step = number // global_batch if kind == "rows" else number
                for slot, value in zip(slots, digests, strict=True):
                    trace.seen[kind][step, slot].add(value)
                    trace.times[step, slot] += kind == "noise"
                last = max(last, step) if kind == "noise" else last
            trace.last.append(last)
        return trace

    @property
    def first(self) -> int | None:
        return min((step for step, _ in self.seen["noise"]), default=None)


# -- Comparison ------------------------------------------------------------------------------------------------------------


def compare_metrics(reference: Path, run: Path) -> tuple[dict[str, float], list[str]]:
    """Worst relative difference per number, and what is missing, doubled or further off than TOLERANCE."""
    worst: dict[str, float] = {}
    problems, tables = [], []
    for path in (reference, run):
        table: dict[tuple[str, int], dict[str, Any]] = {}
        for line in map(json.loads, path.read_text().splitlines()):
            if line["kind"] not in NUMBERS:
                continue
            key = line["kind"], line["step"]
            if key in table:
                problems.append(f"{path}: two {key[0]} lines of step {key[1]}")
            table[key] = line
        tables.append(table)
    expected, found = tables
    problems += [f"{run}: no {kind} line of step {step}" for kind, step in expected.keys() - found.keys()]
    problems += [f"{run}: a {kind} line of step {step} that the reference has not" for kind, step in found.keys() - expected.keys()]
    for kind, step in sorted(expected.keys() & found.keys()):
        for name in NUMBERS[kind]:
            a, b = (_numbers(table[kind, step].get(name, [])) for table in tables)
            if not a and not b:
                continue
            off = max(map(_apart, a, b)) if len(a) == len(b) else math.inf
            worst[f"{kind} {name}"] = max(worst.get(f"{kind} {name}", 0.0), off)
            if not off < TOLERANCE:
                problems.append(f"{run}: {kind} {name} of step {step} is {off:.1e} off")
    return worst, problems


def _apart(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), 1e-30) if math.isfinite(a) and math.isfinite(b) else float(str(a) != str(b))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [number for item in value for number in _numbers(item)] if isinstance(value, list) else [float(value)]


def compare_samples(reference: Trace, attempts: Sequence[tuple[Trace, int]], global_batch: int, steps: int) -> list[str]:
    """What the attempts of one run trained otherwise than the reference; each with the number of ranks that share a replica."""
    problems = []
    for number, (trace, _) in enumerate(attempts):
        for kind, seen in trace.seen.items():
            wrong = sorted(key for key, values in seen.items() if values != reference.seen[kind].get(key))
            problems += [f"attempt {number}: other {kind} in step {step}, slot {slot}" for step, slot in wrong[:3]]
    trained = [(number, trace, peers) for number, (trace, peers) in enumerate(attempts) if trace.first is not None]
    if not trained or trained[0][1].first != 0:
        problems.append("no attempt began with step 0")
    ends = [trace.first for _, trace, _ in trained[1:]] + [steps]
    for (number, trace, peers), end in zip(trained, ends, strict=True):
        keys = [(step, slot) for step in range(trace.first or 0, end or 0) for slot in range(global_batch)]
        wrong = [key for key in keys if trace.times[key] != peers]
        problems += [f"attempt {number}: slot {s} of step {n} was trained {trace.times[n, s] / peers:g} times" for n, s in wrong[:3]]
    return problems
