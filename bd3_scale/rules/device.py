"""The rules between a recipe and the device that computes: which attention kernel and which compilation it can have.

Part of `across_keys.py`, which asks them. Here stands what the recipe and the kind of device say alone; whether a backend works on the
GPU at hand is found by `engines/kernel_probe.py` when a run starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_scale.recipe.environment import compiled_in_pieces, resolve_attention
from bd3_scale.rules.suggestions import Case, Problem

if TYPE_CHECKING:
    pass

FLEX = ("flex", "flex_triton", "flex_flash")


def kernel_suits_the_device(case: Case) -> Problem | None:
    kernel, device = case.recipe.model.attention, case.device
    if kernel in FLEX and device == "cpu":
        text = f"model.attention = {kernel} needs CUDA because FlexAttention has no backward on CPU"
    elif kernel == "tiled" and device == "cuda":
        text = "model.attention = tiled is the CPU kernel"
    else:
        return None
    return Problem(text, lambda: ["set model.attention=auto"])


def ring_has_a_kernel(case: Case) -> Problem | None:
    """Its parts are merged by their log-sum-exp, and in the backward each is differentiated by itself."""
    parallel, device, compile = case.parallel, case.device or "cpu", case.recipe.training.compile
    kernel, gather = resolve_attention(case.recipe.model.attention, device), "set parallel.context_exchange=gather"
    if parallel.context == 1 or parallel.context_exchange == "gather" or kernel == "tiled":
        return None
    if kernel not in FLEX[:2]:
        text = f"parallel.context_exchange = ring needs a log-sum-exp that has gradients; of model.attention = {kernel} it has none"
        auto = ["set model.attention=auto"] if compile == "none" or device == "cpu" else []
        return Problem(text, lambda: [*auto, gather])
    if compile == "none":
        return None
    text = f"parallel.context_exchange = ring asks autograd in its backward on CUDA, which training.compile = {compile} cannot trace"
    return Problem(text, lambda: ["set training.compile=none", gather])


def backend_is_used(case: Case) -> Problem | None:
    """A backend of FlexAttention that is asked for by name runs, or there is no such recipe."""
    recipe, kernel = case.recipe, case.recipe.model.attention
    if kernel not in FLEX[1:]:
        return None
    if not recipe.objective.traits.in_blocks and not recipe.data.document_mask:
        text = (
            f"model.attention = {kernel} is a backend of FlexAttention, which objective.kind = {recipe.objective.kind} does not need: its "
        )
        return Problem(text + "mask is causal or none, and torch's own kernels have it", lambda: ["set model.attention=auto"])
    if kernel == "flex_flash" and case.precision == "fp32":
        text = "model.attention = flex_flash computes in bf16, but training.precision is fp32"
        return Problem(text, lambda: ["set training.precision=bf16", "set model.attention=auto"])
    return None


def tuning_has_a_gpu(case: Case) -> Problem | None:
    if case.recipe.training.compile != "max-autotune" or case.device != "cpu":
        return None
    return Problem(
        "training.compile = max-autotune needs CUDA because it chooses among GPU kernels by timing them",
        lambda: ["set training.compile=none", "set training.compile=blocks"],
    )


def layers_are_compiled_whole(case: Case) -> Problem | None:
    if not compiled_in_pieces(case.recipe.training, case.parallel):
        return None
    return Problem(
        f"training.compile = {case.recipe.training.compile} compiles whole layers, but parallel.engine = deepspeed with parallel.zero = 3 "
        "gathers the weights of every linear by itself",
        lambda: ["set parallel.engine=fsdp", "set training.compile=none"],
    )


DEVICE_RULES = (kernel_suits_the_device, ring_has_a_kernel, backend_is_used, tuning_has_a_gpu, layers_are_compiled_whole)
"""In the order in which they are asked."""
