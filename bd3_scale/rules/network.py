"""The rules for what the parts of a network need of each other, whatever divides it.

As `across_keys.py`, which asks them, and has those of its widths.
"""

from __future__ import annotations

from bd3_scale.recipe.text import as_yaml
from bd3_scale.rules.suggestions import Case, Problem


def width_of_a_norm_has_its_norm(case: Case) -> Problem | None:
    model = case.recipe.model
    if model.query_key_norm or model.query_key_norm_width == "head":
        return None
    text = f"model.query_key_norm_width = {model.query_key_norm_width} is of a norm that model.query_key_norm = false leaves out"
    return Problem(text, lambda: ["set model.query_key_norm=true", "set model.query_key_norm_width=head"])


def norm_has_its_bias(case: Case) -> Problem | None:
    if not case.recipe.model.norm_bias or case.recipe.model.norm == "layernorm":
        return None
    text = "model.norm_bias is true, but model.norm = rmsnorm has no bias"
    return Problem(text, lambda: ["set model.norm_bias=false", "set model.norm=layernorm"])


def rotary_scaling_is_sound(case: Case) -> Problem | None:
    scaling = case.recipe.model.rotary_scaling
    if scaling is None or (len(scaling) == 4 and scaling[0] >= 1 and 0 < scaling[1] < scaling[2] and scaling[3] > 0):
        return None
    text = f"model.rotary_scaling is {as_yaml(scaling)} but must be [factor, low, high, context] with factor >= 1 and 0 < low < high"
    return Problem(text, lambda: ["set model.rotary_scaling=[8,1,4,8192] (Llama 3.1)", "set model.rotary_scaling=null"])


def rotary_local_is_sound(case: Case) -> Problem | None:
    local = case.recipe.model.rotary_local
    if local is not None and case.recipe.model.positions == "learned":
        text = f"model.rotary_local is {as_yaml(local)}, but model.positions = learned turns nothing"
        return Problem(text, lambda: ["set model.rotary_local=null", "set model.positions=rotary"])
    if local is None or (len(local) == 2 and local[0] > 0 and local[1] >= 1 and local[1] == int(local[1])):
        return None
    text = f"model.rotary_local is {as_yaml(local)} but must be [base, n] with base > 0 and n a whole number of layers"
    return Problem(text, lambda: ["set model.rotary_local=[10000,6] (Gemma 3)", "set model.rotary_local=null"])


NETWORK_RULES = (
    norm_has_its_bias,
    width_of_a_norm_has_its_norm,
    rotary_scaling_is_sound,
    rotary_local_is_sound,
)
