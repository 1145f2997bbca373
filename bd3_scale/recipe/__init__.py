"""A recipe: nested dataclasses, read from YAML and dotted overrides.

`schema.py` and, of the network, `network.py` have every key with all that holds of it alone (in the words of `keys.py`),
`definition.py` joins the sections, `load.py` reads, `resume_check.py` compares with the run that is continued,
`python -m bd3_scale.recipe` prints the keys; the room `rules` checks, before anything is started. Invariants: an unknown key, a wrong
type or an impossible combination is a `RecipeError` of one line that names the key, what is wrong and what to set; nothing is silently
changed; nothing here touches torch.distributed.
"""

from bd3_scale.recipe.definition import KEYS, Recipe
from bd3_scale.recipe.environment import resolve_device, resolve_precision, settle
from bd3_scale.recipe.load import load
from bd3_scale.recipe.resume_check import compare
from bd3_scale.recipe.text import as_dictionary, flatten, to_yaml

__all__ = [
    "KEYS",
    "Recipe",
    "as_dictionary",
    "compare",
    "flatten",
    "load",
    "resolve_device",
    "resolve_precision",
    "settle",
    "to_yaml",
]
