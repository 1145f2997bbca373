"""Every objective under every kind of network on a CUDA device: forward, loss, backward, validation and sampling.

What the GPU would refuse is an error of the test; what the host would wait for in a step is counted, printed, and nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.diffusion.config import ROW_MULTIPLE, SELECTED_MULTIPLE, ObjectiveConfig
from bd3_scale.diffusion.decoding import SamplingOptions
from bd3_scale.diffusion.inputs import NetworkInputs, row_nelbo
from bd3_scale.diffusion.objectives import Objective, objective_at
from bd3_scale.diffusion.sampler import generate
from bd3_scale.model.config import ModelConfig
from bd3_scale.model.layers import Linears
from bd3_scale.model.transformer import Transformer
from bd3_scale.parallel.build import VOCABULARY_MULTIPLE, apply_outside
from tests.fake_cuda.device import DEVICE, Operators, fake_cuda

pytestmark = pytest.mark.usefixtures("world_of_one")

L, WORDS, BATCH = 256, 130, 2
GPT: dict[str, Any] = {}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "mlp": "swiglu", "key_value_heads": 2, "query_key_norm": True, "tied_head": True}
DIT: dict[str, Any] = {"conditioning": "adaln", "dropout": 0.1}
BIASED: dict[str, Any] = {
    "positions": "learned", "attention_bias": "all", "mlp_bias": True, "norm_bias": True, "head_bias": True, "dropout": 0.1,
}  # fmt: skip
Case = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "bd3, L' = 1": (LLAMA, {"block_size": 1}),
    "bd3, L' = 4": (GPT, {"block_size": 4}),
    "bd3, L' = 16, adaLN, dropout": (DIT, {"block_size": 16}),
    "bd3, L' = 16, grouped queries, documents": (LLAMA, {"block_size": 16, "documents": True}),
    "bd3, L' = 64, learned positions, biases": (BIASED, {"block_size": 64}),
    "bd3, L' = L": (DIT, {"block_size": L}),
    "bd3, L' = L, documents": (LLAMA, {"block_size": L, "documents": True}),
    "bd3, causal clean half, resampled": (GPT, {"block_size": 16, "clean_half": "causal", "resample": True, "interval": (0.3, 0.8)}),
    "mdlm": (LLAMA, {"kind": "mdlm"}),
    "ar": (LLAMA, {"kind": "ar"}),
    "ar, learned positions, biases": (BIASED, {"kind": "ar"}),
    "ar, documents": (GPT, {"kind": "ar", "documents": True}),
    "sedd": (DIT, {"kind": "sedd"}),
    "ssdlm": (DIT, {"kind": "ssdlm", "block_size": 16}),
    "ssdlm, tied head, L' = L": (DIT | LLAMA, {"kind": "ssdlm", "block_size": L}),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def of(case: str, **more: Any) -> tuple[Transformer, Objective]:
    """The network, on the host, and the objective, in the shapes that it has on CUDA."""
    model, objective = CASES[case]
    config = ModelConfig(context=L, layers=2, hidden=64, heads=4, **model, **more)
    linears = Linears(vocabulary_multiple=VOCABULARY_MULTIPLE["cuda"])
    settings = {key: value for key, value in objective.items() if key != "documents"}
    built = objective_at(
        ObjectiveConfig(**settings), L, WORDS, 0,
        pad_to=SELECTED_MULTIPLE["cuda"], row_multiple=ROW_MULTIPLE["cuda"], document_end=3 if "documents" in objective else None,
    )  # fmt: skip
    return Transformer(config, WORDS + 1, WORDS, linears), built


def rows(count: int = BATCH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, WORDS, (count, L))


def step(network: Transformer, inputs: NetworkInputs) -> Tensor:
    """A micro-batch as engines compute it."""
    loss, nll = network(inputs.to(DEVICE, non_blocking=True))
    (loss / 100).backward()
    assert loss.device == nll.device == DEVICE and loss.dtype == nll.dtype == torch.float32
    assert len(nll) == len(inputs.selected) and len(nll) % 256 == 0
    return nll


def waited_for(device: Operators, work: Callable[[], Any]) -> Counter[str]:
    """What the host waits for when this is done again: the first time masks are made, which stay."""
    work()
    device.waits.clear()
    work()
    return Counter(device.waits)


@every_dtype
@every_case
def test_a_step(case: str, dtype: str, record_property: Callable[[str, object], None]) -> None:
    network, objective = of(case)
    inputs = objective.training_inputs(rows(), np.arange(BATCH), 0, 0, BATCH)
    with fake_cuda() as device:
        network.to(DEVICE, DTYPES[dtype])
        waits = waited_for(device, lambda: step(network, inputs))
        gradients = [parameter.grad for parameter in network.parameters()]
        assert all(gradient is not None and gradient.is_cuda and gradient.dtype == DTYPES[dtype] for gradient in gradients)
    record_property("table", f"waits for a fake CUDA device in a step, {dtype}, {case:45s} {waits.total()} {dict(waits) or ''}")
    assert not waits
