"""Three texts of the checkpoint that a run ends with: the first is printed, all are kept in report/samples.json for the page of the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

COUNT = 3
NAME = "samples.json"


@dataclass(frozen=True)
class Sample:
    """A text, how many tokens it has, BOS included, and what ended it: end_of_text | length."""

    text: str
    tokens: int
    stop: str


def sample_texts(checkpoint: Path, device: str, length: int, seed: int) -> list[Sample]:
    """Texts of at most `length` tokens, the first of them what `bd3 sample` makes by itself; under tensor parallelism the peers of
    one group call it together, whatever the layout of the training was, and each gets the texts."""
    from bd3_scale.generation.generate import generate_tokens
    from bd3_scale.generation.load_model import load_network

    loaded = load_network(checkpoint, device=device)
    result = generate_tokens(loaded, batch=COUNT, length=length, seed=seed)
    decode = loaded.tokenizer.decode
    return [Sample(decode(tokens[1:].tolist()), len(tokens), stop) for tokens, stop in zip(result.tokens, result.stops, strict=True)]


def keep(samples: list[Sample], step: int, folder: Path) -> None:
    """Write them into `folder`, the run's report/, in place of those of an earlier end. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps({"step": step, "samples": [asdict(one) for one in samples]}, indent=1) + "\n", "utf-8")


def kept(folder: Path) -> tuple[int, list[Sample]]:
    """(step, samples) of `folder`; none before a run has ended."""
    try:
        document = json.loads((folder / NAME).read_text("utf-8"))
        return document["step"], [Sample(**one) for one in document["samples"]]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, []
