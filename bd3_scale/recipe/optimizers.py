"""The optimizers by name: the states that each keeps of a parameter, as recipes, checkpoints, costs and engines know them.

A state is a fp32 tensor of the parameter's shape, which a checkpoint holds under the state's name (torch's), beside the weight. Without
torch; `optimizers/settings.py` builds them. Hidden matrices are the linears inside of the layers; all else (embedding, head, learned
positions, adaLN, norms, biases) is other.

Invariant: states of a name never change, because checkpoints hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

HIDDEN = ("attention.query.weight", "attention.key_value.weight", "attention.output.weight", "mlp.up.weight", "mlp.down.weight")
"""How the names of hidden matrices end."""


@dataclass(frozen=True)
class States:
    """Names of the states that an optimizer keeps."""

    hidden: tuple[str, ...]
    """Of a hidden matrix."""
    other: tuple[str, ...]
    whole_matrices: bool = False
    """Whether a hidden matrix is updated as a whole, with training.momentum: ranks that hold parts of it exchange them."""

    def of(self, name: str) -> tuple[str, ...]:
        """Of the parameter `name` (canonical)."""
        return self.hidden if is_hidden(name) else self.other

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, sorted."""
        return tuple(sorted({*self.hidden, *self.other}))


ADAM = ("exp_avg", "exp_avg_sq")
OPTIMIZERS = {"adamw": States(ADAM, ADAM), "muon": States(("momentum_buffer",), ADAM, whole_matrices=True)}


def is_hidden(name: str) -> bool:
    """Whether the parameter `name` is a hidden matrix."""
    return name.endswith(HIDDEN)
