"""A trained model in a program of one's own: load it, let it write, score texts.

python examples/python_api.py runs/quickstart
"""

from __future__ import annotations

import sys

import bd3_scale


def main(run: str) -> None:
    """Print two texts of the model and how probable it finds two others."""
    model = bd3_scale.load_model(run)
    for text in bd3_scale.generate(model, ["Return ", "If "], seed=1, temperature=0.8):
        print(repr(text))
    texts = ["Return a list.", "list a Return."]
    for text, score in zip(texts, bd3_scale.score(model, texts, draws=32), strict=True):
        tokens = len(model.tokenizer.encode(text))
        print(f"{text!r}: {-score / tokens:.2f} nats per token")


if __name__ == "__main__":
    main(sys.argv[1])
