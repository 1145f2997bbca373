"""The weights of `data.mixture`: exact decimals that sum up to 1, so that every source has its share to less than one sample."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

DIGITS = 4
"""Decimals that a weight may have: the period is at most 10^DIGITS samples."""


def weights_problem(weights: Sequence[float]) -> str | None:
    """What is wrong with the weights of a mixture and how to fix it; None: nothing."""
    if not all(0 < weight < float("inf") for weight in weights):
        return f"weights {list(weights)} must all be above 0; leave out what is not to be read"
    if sum(map(exact_weight, weights)) != 1 or not all(map(exact_weight, weights)):
        shares = [max(1, round(10**DIGITS * weight / sum(weights))) for weight in weights]
        shares[shares.index(max(shares))] += 10**DIGITS - sum(shares)
        nearest = ", ".join(str(share / 10**DIGITS) for share in shares)
        return f"weights {list(weights)} must sum up to 1, with at most {DIGITS} decimals each; set them to {nearest}"
    return None


def exact_weight(weight: float) -> Fraction:
    """The decimal that was written, or 0 where it has more than DIGITS decimals."""
    exact = Fraction(repr(float(weight)))
    return exact if (exact * 10**DIGITS).denominator == 1 else Fraction(0)
