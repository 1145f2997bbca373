"""`import streaming` (mosaicml-streaming) without its data sets, and `transformers` beside a torch whose torchvision does not load.

streaming's own data sets (text, vision) import transformers and torchvision, which cost seconds and which nothing here uses.
torchvision's wheel on PyPI is linked against CUDA. Beside a CPU build of torch its library cannot be loaded, its operators
nms and qnms stay undefined, and importing it fails with "operator torchvision::nms does not exist" - and with it
parts of `transformers`, which import it for images that this project never reads. The cure is to declare the two
operators, without an implementation, before torchvision is imported: torchvision then imports and says clearly that its
operators are missing if one is called. Invariant: a torchvision that works is never touched.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bd3_scale.light_imports import left_out

UNUSED = (
    *("streaming.multimodal", "streaming.text", "streaming.vision"),
    *("transformers", "transformers.feature_extraction_utils", "transformers.tokenization_utils_base"),
)
_declared: Any = None
"""The torch library that holds the declarations: they disappear with it."""


def import_streaming(module: str = "streaming") -> types.ModuleType:
    """The module `streaming` or one below it, e.g. "streaming.base.hashing"."""
    if "streaming" not in sys.modules:  # only then: beside a stand-in another thread could not import the real one
        with left_out(*UNUSED):
            importlib.import_module("streaming")
    return importlib.import_module(module)


def prepare_torchvision() -> None:
    """Make `import torchvision` possible, by transformers. May be called often; before the first import of torchvision."""
    global _declared
    if "torchvision" in sys.modules or _declared is not None:
        return
    spec = find_spec("torchvision")
    if spec is None:
        return
    import torch

    if any(_loads(library) for folder in spec.submodule_search_locations or [] for library in sorted(Path(folder).glob("_C*.so"))):
        return
    if not hasattr(torch.ops.torchvision, "nms"):
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _loads(library: Path) -> bool:
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True
