"""Loss and gradients of one step, every objective, against the CPU form of the same network in fp32, with dropout.

Dropout is keyed, not drawn, so that both drop the same: one unit dropped on one side alone would be an error of some hundredths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.compiling import wrap_blocks
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs
from bd3_scale.objectives.table import ObjectiveSchedule
from bd3_scale.recipe.objective_kinds import ROW_MULTIPLE, SELECTED_MULTIPLE
from bd3_scale.recipe.schema import ModelConfig, ObjectiveConfig
from tests.gpu.device import DEVICE, REHEARSAL, needs_gpu, world

pytestmark = needs_gpu

VOCABULARY, MASK, LENGTH, ROWS = 512, 511, 256, 4
GPT = ModelConfig(context=LENGTH, layers=3, hidden=128, heads=2, key_value_heads=1, dropout=0.1)
LLAMA = replace(GPT, norm="rmsnorm", mlp="swiglu", tied_head=True, query_key_norm=True)
ADALN = replace(GPT, conditioning="adaln", mlp_bias=True)
OBJECTIVES = {
    "bd3": (LLAMA, ObjectiveConfig("bd3", 16)),
    "bd3-sparse": (GPT, ObjectiveConfig("bd3", 16, interval=(0.1, 0.3))),
    "bd3-one-block": (ADALN, ObjectiveConfig("bd3", LENGTH)),
    "mdlm": (GPT, ObjectiveConfig("mdlm")),
    "ar": (LLAMA, ObjectiveConfig("ar")),
    "sedd": (ADALN, ObjectiveConfig("sedd")),
    "ssdlm": (ADALN, ObjectiveConfig("ssdlm", 16)),
}
EXACT = 1e-4
"""Of fp32: norm of the difference over norm, of loss, all gradients, and the gradient of each parameter."""
ROUNDED = {"loss": 1e-3, "gradient": 4e-2, "parameter": 0.1}
"""Of bf16 weights and activations, against fp32 with the same weights."""
NO_WORSE = 1.5
"""Times the error of bf16 on the CPU: of the gradient as a whole."""
SMALL = 1e-3
"""A parameter whose gradient is a smaller part of the whole is measured by this part of the whole."""


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with world():
        yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_fp32_is_that_of_the_cpu(name: str) -> None:
    errors = compare(gradients(name, DEVICE, torch.float32), gradients(name, "cpu", torch.float32))
    assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_bf16_loses_its_rounding(name: str, record_property: Callable[[str, object], None]) -> None:
    right = gradients(name, "cpu", torch.float32, rounded=True)
    errors, usual = (compare(gradients(name, device, torch.bfloat16), right) for device in (DEVICE, "cpu"))
    record_property("table", f"{name:16s}" + "".join(f"  {what} {errors[what]:.1e} (CPU's bf16 {usual[what]:.1e})" for what in errors))
    assert all(errors[what] < ROUNDED[what] for what in errors), (errors, usual)
    assert errors["gradient"] < NO_WORSE * usual["gradient"], (errors, usual)


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_compiled_layers_have_the_gradients_of_plain_ones(rows: int, record_property: Callable[[str, object], None]) -> None:
    """Where thousands of selected rows are summed for what modulates the last layer: Inductor's sums in mixed order left some unwritten,
    from 6,827 rows of this width on."""
    length = 128 if REHEARSAL else 1024
    config = replace(ADALN, context=length, layers=2, hidden=768, heads=6, key_value_heads=6)
    clipped = ObjectiveConfig("bd3", 16, interval=(0.3, 0.8))
    objective = ObjectiveSchedule(clipped, length, MASK, pad_to=256, row_multiple=ROW_MULTIPLE["cuda"]).at(0)
    tokens = np.random.default_rng(1).integers(0, MASK, (rows, length))
    given = objective.training_inputs(tokens, np.arange(rows), 0, 0, rows).to(DEVICE)
    found = []
    for choice in ("blocks", "none"):
        network = drawn(config).to(DEVICE, torch.bfloat16)
        wrap_blocks(network.blocks.values(), recompute="none", compile=choice)
        loss = network(given)[0] / (rows * length)
        loss.backward()
        found.append((loss.detach().double().cpu(), {key: value.grad.double().cpu() for key, value in network.named_parameters()}))
    errors = compare(*found)
    record_property(
        "table", f"compiled, {len(given.selected):6d} selected rows" + "".join(f"  {what} {errors[what]:.1e}" for what in errors)
    )
    assert all(errors[what] < 2 * ROUNDED[what] for what in errors), errors


def drawn(config: ModelConfig) -> Transformer:
    """A network of which every parameter matters."""
    network = Transformer(config, VOCABULARY, MASK)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.06, generator=generator)
    return network


def gradients(name: str, device: torch.device | str, dtype: torch.dtype, rounded: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """float64 on the CPU: the loss per data token and its gradients. `rounded`: with the weights that bf16 has."""
    config, objective = OBJECTIVES[name]
    if REHEARSAL and device == DEVICE:
        config = replace(config, attention="dense")  # another way than that of the other side
    network = drawn(config)
    if rounded:
        network = network.bfloat16().float()
    network = network.to(device, dtype)
    loss, _ = network(inputs(objective).to(device))
    (loss / (ROWS * (LENGTH - 1))).backward()
    found = {key: value.grad.double().cpu() for key, value in network.named_parameters() if value.grad is not None}
    return loss.detach().double().cpu() / (ROWS * (LENGTH - 1)), found


def inputs(config: ObjectiveConfig) -> NetworkInputs:
    schedule = ObjectiveSchedule(config, LENGTH, MASK, pad_to=SELECTED_MULTIPLE["cuda"], row_multiple=ROW_MULTIPLE["cuda"])
    objective = schedule.at(0)
    rows = np.random.default_rng(1).integers(0, MASK, (ROWS, LENGTH))
    return objective.training_inputs(rows, np.arange(ROWS), 3, 0, ROWS)


def compare(made: tuple[Tensor, dict[str, Tensor]], right: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    """Relative errors of the loss, of the whole gradient, and of the parameter that has the largest."""
    assert made[1].keys() == right[1].keys()
    norm = torch.stack([value.norm() for value in right[1].values()]).norm()
    errors = {key: (made[1][key] - value).norm() for key, value in right[1].items()}
    assert norm > 0 and torch.isfinite(made[0])
    return {
        "loss": float((made[0] - right[0]).abs() / right[0].abs()),
        "gradient": float(torch.stack(list(errors.values())).norm() / norm),
        "parameter": max(float(error / torch.maximum(right[1][key].norm(), SMALL * norm)) for key, error in errors.items()),
    }
