"""Imports of big libraries without what they bring along and nothing here uses.

megatron-core decorates functions for fusing with torch.compile, which imports the whole compiler, and looks for wandb; mosaicml-streaming
imports transformers, for the types of a loader and for C4. Together that is four of the six seconds of a core that a process of ours took
to start, and a thousand ranks start at once. While such a library is imported, empty modules stand in for what it should do without.

Invariants: a module that is there already stays what it is; after the import nothing stands in for anything, so whoever wants the real
module imports it; what was decorated runs as it was written.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Empty(types.ModuleType):
    """A module in which every name is a class of nothing: good for isinstance and annotations."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


@contextmanager
def left_out(*names: str) -> Iterator[None]:
    """While the block imports something: `import NAME` gives an empty module for each name that was not imported before."""
    standing_in = {name: _Empty(name, "left out of an import") for name in names if name not in sys.modules}
    sys.modules.update(standing_in)
    try:
        yield
    finally:
        for name, module in standing_in.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


@contextmanager
def uncompiled() -> Iterator[None]:
    """While the block imports something: torch.compile, as a decorator, leaves functions as they are."""
    import torch

    compile, torch.compile = torch.compile, _same  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile


def _same(function: Any = None, **options: Any) -> Any:
    return (lambda each: each) if function is None else function
