"""A process starts without what no step uses; what stood in for it is gone when it is wanted."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from bd3_scale.light_imports import left_out, uncompiled

HEAVY = ("torch._inductor.compile_fx", "wandb", "transformers", "torchvision", "deepspeed", "matplotlib", "torch.utils.tensorboard")


def test_a_training_brings_along_only_what_it_uses() -> None:
    """Seconds of every rank; afterwards the real modules can be had."""
    code = (
        "import sys, bd3_scale.training.build, bd3_scale.engines.megatron_engine, bd3_scale.generation.generate; "
        "from bd3_scale.data.formats.streaming_compat import import_streaming, prepare_torchvision; import_streaming().MDSWriter; "
        f"print([name for name in {HEAVY} if name in sys.modules]); "
        "from bd3_scale.engines.zero_engine import _import_deepspeed; _import_deepspeed('cpu'); "
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam; print('torch._inductor.compile_fx' in sys.modules); "
        "prepare_torchvision(); import torch, transformers; print(transformers.PreTrainedModel.__module__, torch.compile.__module__)"
    )
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.splitlines()[-3:] == ["[]", "False", "transformers.modeling_utils torch"]


def test_what_is_there_stays_and_what_stood_in_goes() -> None:
    with pytest.raises(ZeroDivisionError), left_out("json", "not_there", "not_there.below"):
        import json

        from not_there.below import Something  # type: ignore[import-not-found]

        assert json.loads("1") == 1 and not isinstance(1, Something)
        raise ZeroDivisionError
    assert "not_there" not in sys.modules and isinstance(sys.modules["json"], types.ModuleType)
    with pytest.raises(ModuleNotFoundError):
        import not_there.below  # type: ignore[import-not-found]  # noqa: F401


def test_functions_stay_as_they_are_while_nothing_is_compiled() -> None:
    import torch

    compile = torch.compile

    def function() -> int:
        return 1

    with uncompiled():
        assert torch.compile(function) is function and torch.compile(dynamic=True)(function) is function
    assert torch.compile is compile
