"""The formula of the state: it counts the network's own parameters, and it falls where more ranks share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bd3_scale import recipe as recipes
from bd3_scale.costs.flops import count_parameters
from bd3_scale.costs.shapes import units_of
from bd3_scale.costs.state_memory import stage_parameters, state_bytes
from bd3_scale.model.transformer import Transformer
from bd3_scale.recipe.schema import ModelConfig

V = 37
CONFIGS = {
    "plain": ModelConfig(layers=4, hidden=32, heads=4),
    "all biases": ModelConfig(layers=4, hidden=32, heads=4, key_value_heads=2, mlp="swiglu", mlp_hidden=24, mlp_bias=True, head_bias=True,
                              attention_bias="all", norm_bias=True, query_key_norm=True, positions="learned", context=16),
    "adaln, tied": ModelConfig(layers=4, hidden=32, heads=4, conditioning="adaln", conditioning_size=8, tied_head=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_it_counts_the_parameters_of_the_network(name: str, world_of_one: object) -> None:
    config = CONFIGS[name]
    for layers in (range(4), range(2), range(1, 3), range(2, 4)):
        network = Transformer(config, V, V - 1, layers=layers)
        assert sorted(stage_parameters(config, V, layers)) == sorted(p.numel() for p in network.parameters())
        shapes = [shape for group in units_of(config, V, layers).groups for shape in group]
        assert sorted(shapes) == sorted((p.shape[0], p.numel() // p.shape[0]) for p in network.parameters())
    assert sum(stage_parameters(config, V, range(4))) == count_parameters(config, V).total


def test_tensor_ranks_divide_all_but_norms_and_shared_heads() -> None:
    config = replace(CONFIGS["plain"], key_value_heads=2)
    one, two, four = (sum(stage_parameters(config, V, range(4), tensor)) for tensor in (1, 2, 4))
    norms, keys = 9 * 32, 4 * 2 * 2 * 8 * 32
    assert two - norms == (one - norms + 2 * 32) // 2, "37 ids become 38: a row more in the embedding and in the head"
    assert four - norms - keys == (one - norms - keys + 6 * 32) // 4, "40 ids; two key heads for four ranks are held whole"


def test_a_large_model_fits_where_it_should() -> None:
    """6.2B parameters in bf16: 16 bytes each and the EMA's 4 do not fit a GPU of 80 GB, the recipe's layout does."""
    recipe = recipes.load(Path(__file__).parents[3] / "recipes" / "owt_7b.yaml")
    whole = replace(recipe, parallel=replace(recipe.parallel, tensor=1, pipeline=1, virtual_stages=1, zero=1))
    alone = state_bytes(whole, [range(32)], 50258, 1, "cuda", bf16=True)
    assert alone.total > 120e9 and alone.moments == 2 * alone.ema == 8 * (alone.parameters // 2)
    zero_3 = state_bytes(replace(whole, parallel=replace(whole.parallel, zero=3)), [range(32)], 50258, 64, "cuda", bf16=True)
    assert zero_3.total < 5e9
    stage = state_bytes(recipe, [range(4), range(16, 20)], 50258, 4, "cuda", bf16=True)
    assert stage.total < 6e9
