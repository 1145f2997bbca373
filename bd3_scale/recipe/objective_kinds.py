"""The kinds of objectives: one table of what sets them apart, which rules, costs and samplers ask; and what a block size may be.

`objectives/` has a class for each kind, which holds its row of the table. Invariant: nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bd3_scale.errors import RecipeError

VALIDATION_INTERVAL = (1e-3, 1.0)
"""The reported NELBO always draws t from here, whatever training does (objective.md section 1)."""
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
        Kind("mdlm", ("block_size", "clean_half"), denoises_whole_rows=True),
        Kind(
            "sedd",
            ("block_size", "clean_half"),
            denoises_whole_rows=True,
            noise_conditioned=True,
            unconditioned="mdlm",
            uses_cross_entropy=False,
        ),
        Kind(
            "ssdlm",
            ("schedule", "resample"),
            scores_every_token=True,
            noise_conditioned=True,
            unconditioned="bd3",
            has_likelihood_bound=False,
            on_simplex=True,
        ),
        Kind(
            "ar",
            ("block_size", "interval", "clean_half", "schedule", "resample"),
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


def block_sizes(value: Any) -> tuple[tuple[int, int], ...]:
    """`objective.block_size` as ((0, size), (from step, size), ...), steps ascending. Raises RecipeError for anything else."""
    if value is None:
        return ((0, DEFAULT_BLOCK_SIZE),)
    if _whole(value):
        return ((0, _positive(value)),)
    shape = "a whole number or a list of [from step, block size], such as [[0, 1024], [850000, 16]]"
    if not isinstance(value, (list, tuple)) or not value:
        raise RecipeError(f"objective.block_size is {value!r}; set {shape}")
    stages: list[tuple[int, int]] = []
    for stage in value:
        if not isinstance(stage, (list, tuple)) or len(stage) != 2 or not all(_whole(number) for number in stage):
            raise RecipeError(f"objective.block_size has the entry {stage!r}; set {shape}")
        stages.append((int(stage[0]), _positive(stage[1])))
    if stages[0][0] != 0:
        raise RecipeError(f"objective.block_size starts at step {stages[0][0]}, which leaves the steps before without one; start at step 0")
    for (earlier, _), (later, _) in pairwise(stages):
        if later <= earlier:
            raise RecipeError(f"objective.block_size has step {later} after step {earlier}; put the steps in ascending order")
    return tuple(stages)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(size: int) -> int:
    if size < 1:
        raise RecipeError(f"objective.block_size is {size}, but a block has at least one token; set 1 or more")
    return size
