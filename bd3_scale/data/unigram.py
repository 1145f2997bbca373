"""The perplexity of the simplest model of the same text: what a trained model has to beat."""

from __future__ import annotations

import math

import numpy as np


def unigram_perplexity(train_rows: np.ndarray, validation_rows: np.ndarray, vocabulary: int) -> float:
    """Perplexity per token of `validation_rows` under the token frequencies of `train_rows` (int64 [n, L] and [m, L]).

    Frequencies are smoothed by adding one to the count of each of the `vocabulary` ids. Position 0 is left out of both, as the
    objective does: it is never masked and not scored.
    """
    counts = np.bincount(train_rows[:, 1:].ravel(), minlength=vocabulary) + 1.0
    held_out = np.bincount(validation_rows[:, 1:].ravel(), minlength=vocabulary)
    return math.exp(-float(held_out @ np.log(counts / counts.sum())) / float(held_out.sum()))
