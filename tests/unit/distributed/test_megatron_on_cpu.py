"""The CPU view of megatron-core: bound in the listed modules and nowhere else; what is not a device stays torch's."""

from __future__ import annotations

import ast
import importlib
import inspect
from types import ModuleType

import pytest
import torch

from bd3_scale import megatron_core
from bd3_scale.distributed import megatron_on_cpu


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    """The listed modules as megatron-core has them; whatever is bound is put back afterwards."""
    found = [importlib.import_module(f"megatron.core.{name}") for name in megatron_on_cpu.MODULES]
    for module in found:
        monkeypatch.setattr(module, "torch", torch)
    return found


def test_install_binds_one_view_in_every_listed_module_and_keeps_it(modules: list[ModuleType]) -> None:
    megatron_on_cpu.install()
    views = [vars(module)["torch"] for module in modules]
    assert len({id(view) for view in views}) == 1 and views[0] is not torch
    megatron_on_cpu.install()
    assert all(vars(module)["torch"] is views[0] for module in modules), "a second call changes nothing"


def test_torch_itself_is_not_touched(modules: list[ModuleType]) -> None:
    before, cuda = dict(vars(torch)), dict(vars(torch.cuda))
    megatron_on_cpu.install()
    for seen, module in ((before, torch), (cuda, torch.cuda)):
        assert vars(module).keys() == seen.keys()
        assert all(vars(module)[name] is value for name, value in seen.items())
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.empty(1, device="cuda")


def test_other_modules_of_megatron_keep_torch(modules: list[ModuleType]) -> None:
    megatron_on_cpu.install()
    for name in ("parallel_state", "tensor_parallel.cross_entropy", "tensor_parallel.random", "optimizer.clip_grads"):
        assert vars(importlib.import_module(f"megatron.core.{name}"))["torch"] is torch


@pytest.mark.parametrize("version", ["0.16.0", "0.17.0"])
def test_another_version_is_refused(modules: list[ModuleType], version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_core, "VERSION", version)
    with pytest.raises(RuntimeError, match=rf"megatron-core {version} .* need {megatron_on_cpu.VERSION}"):
        megatron_on_cpu.install()
    assert all(vars(module)["torch"] is torch for module in modules), "nothing is bound half-way"


def test_factories_turn_cuda_into_cpu_and_leave_the_rest(modules: list[ModuleType]) -> None:
    megatron_on_cpu.install()
    view = vars(modules[0])["torch"]
    arguments = {
        "empty": (2,), "zeros": (2,), "ones": (2,), "full": ((2,), 3.0), "tensor": ([1, 2],),
        "empty_like": (torch.ones(2),), "zeros_like": (torch.ones(2),),
    }  # fmt: skip
    assert arguments.keys() == set(megatron_on_cpu.FACTORIES)
    for name, positional in arguments.items():
        make = getattr(view, name)
        for device in ("cuda", "cuda:0", torch.device("cuda", 1), view.cuda.current_device()):
            assert make(*positional, device=device).device.type == "cpu", name
        assert make(*positional, device="meta").device.type == "meta", "only cuda is turned"
        assert make(*positional, dtype=torch.float64).dtype == torch.float64
    assert view.cuda.current_device() == torch.device("cpu") and view.cuda.synchronize() is None


def test_the_view_answers_with_torch_s_own_names(modules: list[ModuleType]) -> None:
    megatron_on_cpu.install()
    view = vars(modules[0])["torch"]
    for name in ("Tensor", "float32", "distributed", "autograd", "matmul", "no_grad"):
        assert getattr(view, name) is getattr(torch, name)
    assert view.cuda.is_available is torch.cuda.is_available
    with pytest.raises(AttributeError):
        view.no_such_name  # noqa: B018


def test_every_factory_that_megatron_calls_with_a_device_is_known() -> None:
    """The list of factories is that of the listed modules: none is given a device that the view would pass on."""
    for name in megatron_on_cpu.MODULES:
        source = inspect.getsource(importlib.import_module(f"megatron.core.{name}"))
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            function = call.func
            if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "torch"):
                continue
            device = next((ast.unparse(word.value) for word in call.keywords if word.arg == "device"), "")
            if "cuda" in device:
                assert function.attr in megatron_on_cpu.FACTORIES, f"{name}: torch.{function.attr}(device={device})"


def test_types_are_named_as_on_cuda() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    untouched = torch.nn.Parameter(torch.zeros(1))
    megatron_on_cpu.name_types_as_on_cuda(parameters)
    assert [parameter.type() for parameter in parameters] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]
    assert untouched.type() == "torch.FloatTensor"
    assert [parameter.dtype for parameter in parameters] == [torch.float32, torch.bfloat16]
