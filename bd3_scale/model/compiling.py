"""torch.compile as it is used here: whole or not at all.

What Dynamo cannot trace it leaves out without a word, and a function that it has compiled `recompile_limit` times (8) it runs as
plain Python from then on; FlexAttention then holds the whole matrix of scores. Both are errors here: a layer is one graph, from its
first norm to its last residual, and the limit is beyond what a run needs (patterns x training or validation x sizes of a micro-batch x
`inputs.SIZES` of what is selected in the last layer), so that whoever meets it has found a fault.

Invariants: whatever differs from layer to layer or from step to step reaches compiled code as a tensor; no size is left open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BACKEND = "inductor"
"""torch.compile's."""
VARIANTS = 256
"""Of one function, for all layers together."""


def compiled_whole(function: Callable[..., Any], mode: str = "default", backend: str | None = None) -> Callable[..., Any]:
    """`function` as one graph, all sizes being constants. Raises where it cannot be one graph."""
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 16 * VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled: Callable[..., Any] = torch.compile(function, mode=mode, backend=backend or BACKEND, dynamic=False, fullgraph=True)
    return compiled
