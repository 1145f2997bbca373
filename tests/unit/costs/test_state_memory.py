"""The formula of the state: it falls where more ranks share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bd3_scale import recipe as recipes
from bd3_scale.costs.parameter_shapes import units_of
from bd3_scale.costs.state_memory import state_bytes
from bd3_scale.recipe.schema import ModelConfig

V = 37
PLAIN = ModelConfig(layers=4, hidden=32, heads=4)


def test_tensor_ranks_divide_all_but_norms_and_shared_heads() -> None:
    config = replace(PLAIN, key_value_heads=2)
    one, two, four = (sum(units_of(config, V, range(4), tensor).sizes) for tensor in (1, 2, 4))
    norms, keys = 9 * 32, 4 * 2 * 2 * 8 * 32
    assert two - norms == (one - norms + 2 * 32) // 2, "37 ids become 38: a row more in the embedding and in the head"
    assert four - norms - keys == (one - norms - keys + 6 * 32) // 4, "40 ids; two key heads for four ranks are held whole"


def test_a_large_model_fits_where_it_should() -> None:
    """6.2B parameters in bf16: 16 bytes each and the EMA's 4 do not fit a GPU of 80 GB, the recipe's layout does."""
    recipe = recipes.load(Path(__file__).parents[3] / "recipes" / "owt_7b.yaml")
    whole = replace(recipe, parallel=replace(recipe.parallel, tensor=1, pipeline=1, virtual_stages=1, zero=1))
    alone = state_bytes(whole.model, whole.training, whole.parallel, [range(32)], 50258, 1, "cuda", bf16=True)
    assert alone.total > 120e9 and alone.moments == 2 * alone.ema == 8 * (alone.parameters // 2)
    zero_3 = state_bytes(whole.model, whole.training, replace(whole.parallel, zero=3), [range(32)], 50258, 64, "cuda", bf16=True)
    assert zero_3.total < 5e9
    stage = state_bytes(recipe.model, recipe.training, recipe.parallel, [range(4), range(16, 20)], 50258, 4, "cuda", bf16=True)
    assert stage.total < 6e9
