"""What is asked of the compiler by name runs, or the run does not start: options reach the kernel, a probe finds what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bd3_scale import compiling
from bd3_scale.attention import kernels
from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.engines import kernel_probe
from bd3_scale.engines.kernel_probe import OPTIONS, Shape, as_line, probe_recipe, survey
from bd3_scale.errors import RecipeError, TrainingError
from bd3_scale.recipe import KEYS, Recipe

CPU = torch.device("cpu")
PATTERN = AttentionPattern("block_diffusion", 1024, 16)
SHAPE = Shape(PATTERN, groups=2, head_size=16, precision="fp32", documents=False)


def asked(kernel: str = "auto", compile: str = "none") -> Recipe:
    recipe = Recipe()
    return replace(recipe, model=replace(recipe.model, attention=kernel), training=replace(recipe.training, compile=compile, steps=1))


@pytest.mark.parametrize(
    ("kernel", "options"), [("flex", None), ("flex_triton", {"BACKEND": "TRITON"}), ("flex_flash", {"BACKEND": "FLASH"})]
)
def test_a_backend_reaches_the_kernel(kernel: str, options: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch knows the option and the value, and the compiled function is called with them."""
    from torch.nn.attention.flex_attention import FlexKernelOptions, _Backend

    seen: list[dict[str, Any]] = []

    def compiled(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        seen.append(keywords)
        return q

    monkeypatch.setattr(kernels, "_flex", lambda function, compiled_, backend: compiled)
    q = torch.zeros(PATTERN.rows, 1, 2, 16)
    kernels.attend(q, q, q, PATTERN, kernel)
    assert [one["kernel_options"] for one in seen] == [options]
    if options is not None:
        assert "BACKEND" in FlexKernelOptions.__annotations__ and options["BACKEND"] in _Backend.__args__


def test_a_backend_without_cuda_is_an_error_and_not_another_kernel() -> None:
    q = torch.zeros(PATTERN.rows, 1, 2, 16)
    with pytest.raises(RecipeError, match=r"needs CUDA; set model\.attention=auto"):
        kernels.attend(q, q, q, PATTERN, "flex_flash")


def test_defaults_are_not_probed_and_what_is_asked_for_is() -> None:
    assert probe_recipe(asked(), CPU) == [] and probe_recipe(asked(compile="blocks"), CPU) == []
    for kernel in ("flex_triton", "flex_flash"):
        with pytest.raises(
            TrainingError, match=rf"^model.attention = {kernel} does not work on cpu \(RecipeError: .*; set model.attention=auto"
        ):
            probe_recipe(asked(kernel), CPU)
    with pytest.raises(TrainingError, match=r"^training.compile = max-autotune does not work on cpu .*; set training.compile=blocks$"):
        probe_recipe(asked(compile="max-autotune"), CPU)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", ["block_diffusion", "causal"])
def test_a_probe_compares_with_the_reference(kind: Any, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SHAPE, pattern=replace(PATTERN, kind=kind), documents=documents)
    found = kernel_probe.probe(shape, CPU)
    assert found.difference < 1e-5 and as_line(found)["kind"] == "probe"
    right = kernels.KERNELS["tiled"]
    monkeypatch.setitem(kernels.KERNELS, "tiled", lambda q, k, v, *rest: right(q, k, v * 1.01, *rest))
    with pytest.raises(TrainingError, match=r"differs from the reference by .*; set model\.attention=auto"):
        kernel_probe.probe(shape, CPU)


def test_an_error_of_the_compiler_names_the_key_and_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> float:
        raise RuntimeError("BACKEND='FLASH' but flash attention cannot be used:\n CUTE flash attention library is not available")

    monkeypatch.setattr(kernel_probe, "_difference", fails)
    monkeypatch.setattr(kernel_probe, "_need_tuning", lambda device: None)
    with pytest.raises(TrainingError) as error:
        probe_recipe(asked("flex_flash"), CPU)
    text = str(error.value)
    assert (
        text.startswith("model.attention = flex_flash does not work")
        and "\n" not in text
        and "not available); set model.attention=auto" in text
    )
    assert "pip install --pre flash-attn-4" in text
    works, broken = survey(asked(), CPU)
    assert works == [] and list(broken) == [f"{key} = {value}" for key, value in OPTIONS]


def test_what_works_is_listed_and_tried_with_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str]] = []

    def fine(shape: Shape, device: torch.device, kernel: str, compile: str) -> float:
        tried.append((kernel, compile))
        return 1e-6

    monkeypatch.setattr(kernel_probe, "_difference", fine)
    monkeypatch.setattr(kernel_probe, "_need_tuning", lambda device: None)
    assert survey(asked(), CPU) == ([f"{key} = {value}" for key, value in OPTIONS], {})
    assert tried == [("flex_triton", "none"), ("flex_flash", "none"), ("auto", "max-autotune")]
    found = probe_recipe(asked("flex_flash", "max-autotune"), CPU)
    assert [(one.key, one.value) for one in found] == [("model.attention", "flex_flash"), ("training.compile", "max-autotune")]
    assert tried[3:] == [("flex_flash", "none"), ("flex_flash", "max-autotune")]


def test_options_are_choices_of_a_recipe_and_modes_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import list_mode_options

    assert all(value in KEYS[key].choices for key, value in OPTIONS)
    assert ("none", *compiling.COMPILE_MODES) == KEYS["training.compile"].choices
    assert set(compiling.COMPILE_MODES.values()) <= set(list_mode_options())
    assert list_mode_options("max-autotune-no-cudagraphs").get("max_autotune") is True
    for choice, mode in [("none", None), *compiling.COMPILE_MODES.items()]:
        said: list[str] = []
        monkeypatch.setattr(compiling, "compiled_whole", lambda method, mode, backend, said=said: said.append(mode) or method)
        compiling.wrap_blocks([torch.nn.Linear(2, 2)], recompute="none", compile=choice)
        assert said == ([] if mode is None else [mode])
