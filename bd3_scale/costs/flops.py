"""Parameters and FLOPs of a network, counted from its configuration: what MFU and planning rest on.

Counted is what is computed, no more: the last layer computes the expected number of selected positions, and of the other rows keys and
values only (all scored rows where every token is scored); attention is its visible pairs (L^2 + L L' of 4 L^2; Arriola et al. 2025,
appendix B.6), in the last layer those of the scored half; the head sees the selected positions. A multiply-add is two FLOPs;
elementwise work, norms, rotary angles and the conditioning (one vector per micro-batch) are left out, as everywhere in the field.
Backward is twice forward: a kernel that computes attention scores again in its backward does so on its own account, and so does
activation checkpointing (`recomputed`; `model` is without it).

"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import astuple, dataclass
from functools import lru_cache
from math import prod

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs.parameter_shapes import parameter_shapes
from bd3_scale.recipe.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Trained elements by part."""

    embedding: int = 0
    """Of tokens, and of positions where they are learned."""
    attention: int = 0
    mlp: int = 0
    norms: int = 0
    conditioning: int = 0
    head: int = 0
    """0 for a tied head without bias."""

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class RowFlops:
    """FLOPs of one *forward* over one row of L data tokens with all its draws, by part; training totals as properties, per row as well."""

    projections: float
    """Query, key, value and output linears."""
    attention: int
    """q k^T and the sum over v, visible pairs only."""
    mlp: float
    head: float
    """Of the expected number of selected positions."""
    embedding: float = 0.0
    """Of the expected embeddings of noised words: their masses times the embedding. The masses have no gradient: backward is once
    forward."""

    @property
    def layers(self) -> float:
        return self.projections + self.attention + self.mlp

    @property
    def forward(self) -> float:
        return self.layers + self.head + self.embedding

    @property
    def model(self) -> float:
        """A training step, forward and backward: what MFU counts."""
        return 3 * (self.layers + self.head) + 2 * self.embedding

    def recomputed(self, recompute: str) -> float:
        """What `training.recompute` (none | attention | mlp | layer) runs once more in a backward: a forward of that part of the layers."""
        attention = self.projections + self.attention
        return {"none": 0, "attention": attention, "mlp": self.mlp, "layer": self.layers}[recompute]


def count_parameters(config: ModelConfig, vocabulary: int) -> ParameterCount:
    """`vocabulary` is V, MASK included. Equal to the network's, element for element."""
    counted: Counter[str] = Counter()
    for name, parameter in parameter_shapes(config, vocabulary).items():
        counted[_part(name)] += prod(parameter.shape)
    return ParameterCount(**counted)


def _part(name: str) -> str:
    """The part of the network that a parameter belongs to, as `ParameterCount` names it."""
    root, module = name.split(".")[0], name.split(".")[-2]
    if "norm" in module:
        return "norms"
    if root == "blocks":
        return "conditioning" if module == "modulation" else name.split(".")[2]
    return {"positions": "embedding", "condition": "conditioning", "final_modulation": "conditioning"}.get(root, root)


def count_flops(config: ModelConfig, pattern: AttentionPattern, vocabulary: int, selected: float, simplex: bool = False) -> RowFlops:
    """FLOPs of one row of data under `pattern`; `selected`: the expected share of its scored rows that reach the head.

    For block diffusion that is the mean mask probability over the interval, for next-token prediction 1.
    `simplex`: whether noisy rows are expected embeddings of all words (ssdlm), of which every one is scored.
    """
    hidden, width = config.hidden, config.heads * config.head_size
    # Queries, attention output and MLP run on all rows, in the last layer on what is scored alone (token 0 never is).
    scored = selected * pattern.draws * (pattern.length - 1)
    every_token = simplex or pattern.kind == "causal"
    rows = (config.layers - 1) * pattern.rows + (pattern.scored_rows if every_token else scored)
    pairs = (config.layers - 1) * pattern.visible_pairs + scored_pairs(pattern)
    keys = config.layers * pattern.rows
    return RowFlops(
        projections=2 * hidden * (2 * width * rows + 2 * config.kv_heads * config.head_size * keys),
        attention=4 * width * pairs,
        mlp=2 * hidden * config.mlp_size * (3 if config.gated else 2) * rows,
        head=2.0 * hidden * vocabulary * scored,
        embedding=2.0 * hidden * (vocabulary - 1) * pattern.scored_rows if simplex else 0.0,
    )


def scored_pairs(pattern: AttentionPattern) -> int:
    """Visible pairs whose query row can have a loss: for block diffusion those of the noisy streams, L (L + L') / 2 each."""
    if pattern.kind == "block_diffusion":
        return pattern.draws * (pattern.length * (pattern.length + pattern.block_size) // 2)
    return pattern.visible_pairs


def training_flops_per_token(
    config: ModelConfig,
    pattern: AttentionPattern,
    vocabulary: int,
    selected: float,
    recompute: str = "none",
    simplex: bool = False,
) -> float:
    """FLOPs of a training step per data token (L of them in a row, counted once although (draws + 1) L rows are computed).

    `recompute` none: model FLOPs, the numerator of MFU. Else those that run under this `training.recompute`.
    """
    row = count_flops(config, pattern, vocabulary, selected, simplex)
    return (row.model + row.recomputed(recompute)) / pattern.length


# -- What the device could do ------------------------------------------------------------------------------------------

_PEAKS: tuple[tuple[str, float | None, float | None, float], ...] = (
    (r"B200", 2250.0, 1125.0, 75.0),
    (r"GH200|H200(?! NVL)|H100(?! PCIe| NVL)|H800(?! PCIe)", 989.4, 494.7, 66.9),
    (r"H200 NVL|H100 NVL", 835.5, 417.5, 60.0),
    (r"H100 PCIe|H800 PCIe", 756.0, 378.0, 51.2),
    (r"A100|A800", 312.0, 156.0, 19.5),
    (r"L40S", 362.0, 183.0, 91.6),
    (r"L40", 181.0, 90.5, 90.5),
    (r"L4", 121.0, 60.0, 30.3),
    (r"A40", 149.7, 74.8, 37.4),
    (r"A30", 165.0, 82.0, 10.3),
    (r"A10", 125.0, 62.5, 31.2),
    (r"RTX A6000", 154.8, 77.4, 38.7),
    (r"RTX 4090", 165.2, 82.6, 82.6),
    (r"RTX 3090", 71.0, 35.6, 35.6),
    (r"V100-SXM2", None, None, 15.7),
    (r"V100-PCIE", None, None, 14.0),
)
"""Whole-word name of the device as CUDA reports it -> TFLOP/s of the data sheet, without sparsity: bf16 with fp32 sums, TF32,
fp32. None: the part has no such units."""

_PRECISIONS = ("bf16", "tf32", "fp32")


@lru_cache
def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that one device could reach at most in `precision` (bf16 | tf32 | fp32, the last without TF32); None where that
    is not known.

    None, too, for parts that share a name with a larger one: a MIG slice, a laptop, a variant with a suffix of its own.
    """
    if precision not in _PRECISIONS or re.search(r"\bMIG\b|Laptop|Max-Q|\bRTX 4090 D\b|\bRTX 3090 Ti\b", device_name):
        return None
    for name, *peaks in _PEAKS:
        if re.search(rf"\b(?:{name})\b", device_name):
            peak = peaks[_PRECISIONS.index(precision)]
            return None if peak is None else peak * 1e12
    return None
