"""The table of parameters against the network: names, shapes and what is divided, for every kind of model and of stage.

Here one rank holds everything. That tensor ranks hold what the table says is checked by `plan --rehearse` (tests/distributed/
test_rehearsal.py); that the gradients called partial are those which are, by the parity of the layouts (test_layouts.py).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from bd3_scale.costs.parameter_shapes import parameter_shapes, units_of
from bd3_scale.model.layers import TensorParallelFactory, full_shape
from bd3_scale.model.transformer import Transformer
from bd3_scale.recipe.schema import ModelConfig

V = 37
ALL = ModelConfig(context=16, layers=4, hidden=32, heads=4, key_value_heads=2, positions="learned", attention_bias="all", norm_bias=True,
                  query_key_norm=True, mlp="swiglu", mlp_hidden=24, mlp_bias=True, conditioning="adaln", head_bias=True)  # fmt: skip
SWITCHES: dict[str, tuple[Any, Any]] = {
    "key_value_heads": (None, 2),
    "head_width": (None, 6),
    "positions": ("rotary", "learned"),
    "attention_bias": ("query_key_value", "all"),
    "query_key_norm": (False, True),
    "query_key_norm_width": ("head", "heads"),
    "norm_place": ("before", "both"),
    "norm_bias": (False, True),
    "mlp": ("gelu", "swiglu"),
    "mlp_bias": (False, True),
    "conditioning": ("none", "adaln"),
    "tied_head": (False, True),
    "head_bias": (False, True),
}


def variants() -> list[ModelConfig]:
    """Every pair of switches in all four positions, the others as by default or all turned."""
    found = []
    for (one, ones), (other, others) in itertools.combinations(SWITCHES.items(), 2):
        for turned, pair in itertools.product((0, 1), itertools.product(ones, others)):
            chosen = {name: values[turned] for name, values in SWITCHES.items()} | dict(zip((one, other), pair, strict=True))
            found.append(ModelConfig(context=16, layers=3, hidden=32, heads=4, conditioning_size=8, mlp_hidden=24, **chosen))
    return [ModelConfig(context=16, layers=3, hidden=32, heads=4), *found]


def test_the_table_is_the_network(world_of_one: object) -> None:
    for config in variants():
        for layers in (range(3), range(1), range(1, 2), range(2, 3)):
            network = Transformer(config, V, V - 1, layers=layers)
            held = {name: full_shape(parameter, 1) for name, parameter in network.named_parameters()}
            table = parameter_shapes(config, V, layers)
            assert {name: (one.shape, one.divided) for name, one in table.items()} == held, (config, layers)
            assert list(table) == sorted(table, key=list(held).index), (config, layers)
            units = sorted(shape for group in units_of(config, V, layers).groups for shape in group)
            assert units == sorted(one.held(1) for one in table.values()), (config, layers)
            assert not any(one.partial for one in table.values()), "one rank knows all"


@pytest.mark.parametrize("tied", [False, True])
def test_units_have_the_padding_of_the_network(tied: bool, world_of_one: object) -> None:
    config = ModelConfig(context=16, layers=2, hidden=32, heads=4, tied_head=tied, head_bias=True)
    network = Transformer(config, V, V - 1, TensorParallelFactory(vocabulary_multiple=8))
    assert sorted(units_of(config, V, range(2), 1, 8).sizes) == sorted(parameter.numel() for parameter in network.parameters())


def test_tensor_ranks_know_in_part_what_acts_on_their_rows_and_heads() -> None:
    def partial(tensor: int, sequence: bool, config: ModelConfig = ALL) -> set[str]:
        found = parameter_shapes(config, V, range(1), tensor, sequence)
        assert all(one.divided < 0 for one in found.values() if one.partial), "who holds a part has the whole gradient of it"
        return {name.removeprefix("blocks.0.") for name, one in found.items() if one.partial}

    heads = {"attention.query_norm.weight", "attention.key_norm.weight"}
    shared = {"attention.key_value.weight", "attention.key_value.bias"}
    rows = {f"{module}.{kind}" for module in ("attention_norm", "mlp_norm", "modulation") for kind in ("weight", "bias")}
    rows |= {"attention.output.bias", "mlp.down.bias", "positions.weight"}
    assert partial(2, False) == heads
    assert partial(4, False) == heads | shared
    assert partial(2, True) == heads | rows
    assert partial(4, True) == heads | shared | rows
    over_heads = replace(ALL, query_key_norm_width="heads")
    assert partial(2, False, over_heads) == set()
    assert partial(4, False, over_heads) == {"attention.key_norm.weight"} | shared
