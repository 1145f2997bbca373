"""Every objective under every kind of network on a CUDA device: forward, loss, backward, validation and sampling.

What the GPU would refuse is an error of the test; what the host would wait for in a step is counted, printed, and nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_scale.compiling import wrap_blocks
from bd3_scale.costs.sizes import VOCABULARY_MULTIPLE
from bd3_scale.distributed.layout import Layout
from bd3_scale.generation.sampler import generate
from bd3_scale.generation.token_sampling import SamplingOptions
from bd3_scale.model.layers import TensorParallelFactory
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs
from bd3_scale.objectives.table import Objective, ObjectiveSchedule
from bd3_scale.recipe.objective_kinds import ROW_MULTIPLE, SELECTED_MULTIPLE
from bd3_scale.recipe.schema import ModelConfig, ObjectiveConfig
from bd3_scale.training.validation import Validator
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
    factory = TensorParallelFactory(vocabulary_multiple=VOCABULARY_MULTIPLE["cuda"])
    settings = {key: value for key, value in objective.items() if key != "documents"}
    built = ObjectiveSchedule(
        ObjectiveConfig(**settings), L, WORDS,
        pad_to=SELECTED_MULTIPLE["cuda"], row_multiple=ROW_MULTIPLE["cuda"], document_end=3 if "documents" in objective else None,
    ).at(0)  # fmt: skip
    return Transformer(config, WORDS + 1, WORDS, factory), built


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
    device.forget()
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
    record_property("table", f"fake CUDA device, a step, {dtype}, {case:45s} {waits.total()} waits {dict(waits) or ''}")
    assert not waits


@pytest.mark.parametrize("recompute", ["attention", "mlp", "layer"])
def test_a_step_with_recomputation(recompute: str) -> None:
    network, objective = of("bd3, L' = 16, adaLN, dropout")
    wrap_blocks(network.blocks.values(), recompute=recompute, compile="none")
    inputs = objective.training_inputs(rows(), np.arange(BATCH), 0, 0, BATCH)
    with fake_cuda() as device:
        network.to(DEVICE, torch.bfloat16)
        assert not waited_for(device, lambda: step(network, inputs))


@pytest.mark.parametrize("case", ["bd3, L' = 16, adaLN, dropout", "ssdlm, tied head, L' = L"])
def test_a_step_in_two_stages(case: str) -> None:
    """What the first hands on is on the device; the second hands back a gradient of its type."""
    whole, objective = of(case)
    inputs = objective.training_inputs(rows(), np.arange(BATCH), 0, 0, BATCH)
    first, second = (Transformer(whole.config, WORDS + 1, WORDS, whole.factory, layers) for layers in (range(1), range(1, 2)))

    def both() -> None:
        handed = first(inputs.to(DEVICE, non_blocking=True))
        received = handed.detach().requires_grad_()
        loss, _ = second(inputs.to(DEVICE, non_blocking=True), received)
        loss.backward()
        handed.backward(received.grad)

    with fake_cuda() as device:
        for stage in (first, second):
            stage.to(DEVICE, torch.bfloat16)
        assert not waited_for(device, both)
        assert all(parameter.grad is not None for parameter in first.parameters())


class HeldOut:
    """Rows to validate on."""

    def __len__(self) -> int:
        return 3

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return rows(3)[indices]


@every_case
def test_a_validation(case: str, world_of_one: Layout) -> None:
    """Two forwards of bf16 weights: the host reads the answer of each, for the mean and again for the tuner, and nothing else."""
    network, objective = of(case)
    tuned = not (objective.traits.predicts_next_token or objective.traits.on_simplex)  # which have no interval
    with fake_cuda(answer=2) as device:
        network.to(DEVICE, torch.bfloat16).eval()

        @torch.no_grad()
        def evaluate(micro_batches: Sequence[NetworkInputs]) -> list[Tensor | None]:
            return [network(inputs.to(DEVICE, non_blocking=True))[1] for inputs in micro_batches]

        validator = Validator(HeldOut(), replace(world_of_one, device=DEVICE), rows=3, micro_batch=BATCH, seed=0)

        def validate() -> Any:
            return validator.and_tune(objective, evaluate, resample=False, rows=None)[0] if tuned else validator(objective, evaluate)

        waits = waited_for(device, validate)
    assert waits == {"copy to the host": 4 if tuned else 2}


SAMPLED: dict[str, tuple[str, dict[str, Any]]] = {
    "bd3, first hitting": ("bd3, L' = 16, adaLN, dropout", {}),
    "bd3, ancestral, nucleus": ("bd3, L' = 4", {"sampler": "ancestral", "steps": 2, "top_p": 0.9}),
    "bd3, confidence, L' = 64": ("bd3, L' = 64, learned positions, biases", {"sampler": "confidence", "temperature": 0.0}),
    "bd3, documents, strict nucleus": ("bd3, L' = 16, grouped queries, documents", {"top_p": 0.9, "nucleus": "strict"}),
    "bd3, causal clean half": ("bd3, causal clean half, resampled", {}),
    "mdlm": ("mdlm", {"sampler": "ancestral", "steps": 4}),
    "ar": ("ar", {}),
    "sedd, analytic": ("sedd", {"sampler": "analytic", "steps": 4}),
    "sedd, Euler": ("sedd", {"sampler": "euler", "steps": 4}),
    "ssdlm": ("ssdlm", {"sampler": "simplex", "steps": 3}),
    "ssdlm, L' = L": ("ssdlm, tied head, L' = L", {"sampler": "simplex", "steps": 3}),
}
READ_A_FORWARD = 3
"""Whether logits are numbers, the tokens drawn, and what a sampler that asks the network which tokens to reveal has to know."""


@pytest.mark.parametrize(("sampled", "use_cache"), [(name, True) for name in SAMPLED] + [(next(iter(SAMPLED)), False), ("ar", False)])
def test_sampling(sampled: str, use_cache: bool, record_property: Callable[[str, object], None]) -> None:
    """A prompt that ends inside a block, and a text that ends in the next, in bf16; every drawn token is the 1 that the host finds."""
    case, options = SAMPLED[sampled]
    network, objective = of(case)
    tokens, known = np.ones((BATCH, 36), np.int64), np.zeros((BATCH, 36), bool)
    known[:, :28] = True
    with fake_cuda(answer=1) as device:
        network.to(DEVICE, torch.bfloat16).eval()
        device.forget()
        settings = SamplingOptions(**options)
        found = generate(network, objective, tokens, known, settings, mask_id=WORDS, end_of_text=None, use_cache=use_cache, device=DEVICE)
    assert [len(text) for text in found.tokens] == [36] * BATCH and all((text == 1).all() for text in found.tokens)
    reads = device.waits["copy to the host"] + device.waits["_local_scalar_dense"]
    assert 0 < reads <= READ_A_FORWARD * found.nfe
    name = f"{found.nfe} forwards of {sampled}{'' if use_cache else ', no cache'}"
    record_property("table", f"fake CUDA device, {name:58s} {reads} reads, {device.waits.total() - reads} copies to the device")


def test_a_cache_whose_oldest_rows_go() -> None:
    """Beyond the context."""
    network, objective = of("bd3, L' = 16, adaLN, dropout")
    tokens, known = np.ones((1, 2 * L), np.int64), np.ones((1, 2 * L), bool)
    known[:, -4:] = False
    with fake_cuda(answer=1):
        network.to(DEVICE).eval()
        found = generate(network, objective, tokens, known, SamplingOptions(), mask_id=WORDS, end_of_text=None, device=DEVICE)
    assert len(found.tokens[0]) == 2 * L
