"""bd3_scale: block discrete denoising diffusion language models (BD3-LMs), trained at scale.

The public names are imported where they are used first: `import bd3_scale` alone stays fast and without torch.
"""

import importlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bd3_scale.api import generate, load_model, load_recipe, score, train_recipe
    from bd3_scale.objectives.table import register_objective
    from bd3_scale.recipe.objective_kinds import Kind

STARTED = time.monotonic()
"""When this process began, but for the start of the interpreter: what run.time_limit counts from. The time of the system's boot, by which
the operating system tells it, was seen shifted in containers."""
__version__ = "0.2.0"
__all__ = ["Kind", "generate", "load_model", "load_recipe", "register_objective", "score", "train_recipe"]

_PUBLIC = {name: "bd3_scale.api" for name in __all__}
_PUBLIC |= {"Kind": "bd3_scale.recipe.objective_kinds", "register_objective": "bd3_scale.objectives.table"}


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bd3_scale' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
