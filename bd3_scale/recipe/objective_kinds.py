"""The kinds of objectives: one table of what sets them apart, which rules, costs and samplers ask; and what a block size may be.

`objectives/` has a class for each kind, which holds its row of the table. Invariant: nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bd3_scale.errors import RecipeError
from bd3_scale.recipe.mixture_weights import weights_problem
from bd3_scale.recipe.stages import stages

VALIDATION_INTERVAL = (1e-3, 1.0)
"""The reported NELBO always draws t from here, whatever training does (docs/objective.md section 1)."""
SELECTED_MULTIPLE = {"cpu": 1, "cuda": 256}
"""Selected positions are padded to a multiple of this: CUDA wants shapes that repeat."""
ROW_MULTIPLE = {"cpu": 1, "cuda": 128}
"""The clean half is only cut to a multiple of this: the tile of FlexAttention, and what matrix units like."""
DEFAULT_BLOCK_SIZE = 4
"""L' of kinds in blocks where the recipe sets none."""


@dataclass(frozen=True)
class Kind:
    """What sets an objective apart. The defaults are those of bd3."""

    name: str
    """`objective.kind` of a recipe."""
    unused_keys: tuple[str, ...] = ()
    """Keys of `objective` that mean nothing to it; a recipe must leave them at their defaults."""
    denoises_whole_rows: bool = False
    """A row is one block, L' = L, and alone in the network."""
    scores_every_token: bool = False
    """Every data token of a row is scored, whatever the noise (else the masked ones)."""
    predicts_next_token: bool = False
    """The logits of position i predict token i + 1 (else token i)."""
    noise_conditioned: bool = False
    """The network is conditioned on how noisy its input is (`NetworkInputs.noise_levels`), which needs model.conditioning."""
    unconditioned: str | None = None
    """The kind that is like this one without the conditioning on noise."""
    uses_cross_entropy: bool = True
    """The softmax of the logits are probabilities; else exp of the logits are scores, up to a known factor."""
    has_likelihood_bound: bool = True
    """The validation loss is, or bounds, the negative log-likelihood; else it is a cross-entropy, comparable only with itself."""
    on_simplex: bool = False
    """Noise is added to vectors over all words (`objectives.simplex`) instead of masking some tokens."""

    @property
    def in_blocks(self) -> bool:
        """Whether rows are [x_t ; x_0], cut into blocks of `objective.block_size`."""
        return "block_size" not in self.unused_keys

    @property
    def has_interval(self) -> bool:
        """Whether training draws a time t."""
        return "interval" not in self.unused_keys


KINDS = {
    kind.name: kind
    for kind in (
        Kind("bd3"),
        Kind("mdlm", ("block_size", "clean_half", "draws", "pairs"), denoises_whole_rows=True),
        Kind(
            "sedd",
            ("block_size", "clean_half", "draws", "pairs"),
            denoises_whole_rows=True,
            noise_conditioned=True,
            unconditioned="mdlm",
            uses_cross_entropy=False,
        ),
        Kind(
            "ssdlm",
            ("noise_schedule", "density", "density_shape", "resample", "pairs"),
            scores_every_token=True,
            noise_conditioned=True,
            unconditioned="bd3",
            has_likelihood_bound=False,
            on_simplex=True,
        ),
        Kind(
            "ar",
            ("block_size", "interval", "density", "density_shape", "clean_half", "noise_schedule", "resample", "draws", "pairs"),
            scores_every_token=True,
            predicts_next_token=True,
        ),
    )
}
"""objective.kind -> what it is. `objectives.table.register_objective` adds to it."""


def kind_named(name: str) -> Kind:
    """Raises RecipeError for a kind that is not in KINDS."""
    if name not in KINDS:
        raise RecipeError(f"objective.kind is {name!r}, which does not exist; set one of {', '.join(KINDS)}")
    return KINDS[name]


def block_size_shares(value: Any) -> dict[int, float]:
    """`objective.block_size` as {size: share of the updates}, the largest share first; one size for anything but a mixture. Raises
    RecipeError."""
    if not isinstance(value, dict):
        return {block_sizes(value)[-1][1]: 1.0}
    key, example = "objective.block_size", "{4: 0.5, 16: 0.3, 1024: 0.2}"
    if not value or not all(type(size) is int and size >= 1 for size in value):
        raise RecipeError(f"{key} is {value!r}; a mixture gives block sizes their shares, such as {example}")
    if not all(type(share) in (int, float) for share in value.values()):
        raise RecipeError(f"{key} is {value!r}, whose shares are not all numbers; set shares that sum up to 1, such as {example}")
    if (problem := weights_problem(list(value.values()))) is not None:
        raise RecipeError(f"{key}: {problem}")
    return {size: float(share) for size, share in sorted(value.items(), key=lambda item: (-item[1], item[0]))}


def block_sizes(value: Any) -> tuple[tuple[int, int], ...]:
    """`objective.block_size` as ((0, size), (from step, size), ...), steps ascending; of a mixture, which has no stages, the size of the
    largest share. Raises RecipeError for anything else."""
    if isinstance(value, dict):
        return ((0, next(iter(block_size_shares(value)))),)
    return stages(
        "objective.block_size",
        DEFAULT_BLOCK_SIZE if value is None else value,
        counted="step",
        number="block size",
        least="a block has at least one token",
        example="[[0, 1024], [850000, 16]]",
    )
