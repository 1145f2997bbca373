"""bd3_scale: block discrete denoising diffusion language models (BD3-LMs), trained at scale."""

import importlib
import time
from typing import Any

STARTED = time.monotonic()
"""When this process began, but for the start of the interpreter: what run.time_limit counts from. The time of the system's boot, by which
the operating system tells it, was seen shifted in containers."""
__version__ = "0.1.0"

_PUBLIC = {"Kind": "bd3_scale.recipe.objective_kinds", "register_objective": "bd3_scale.objectives.table"}
"""Names that are imported where they are used first: `import bd3_scale` alone stays fast and without torch."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bd3_scale' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
