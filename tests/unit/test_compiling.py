"""A compiled layer is one graph, the same for all layers and steps, or an error; and it computes what the plain one does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from bd3_scale.attention.kernels import block_mask, document_block_mask, flex_with_lse
from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.compiling import COMPILE_MODES, compiled_whole, wrap_blocks
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs
from bd3_scale.objectives.table import BlockDiffusion
from bd3_scale.recipe.schema import ModelConfig

pytestmark = pytest.mark.usefixtures("world_of_one")

VOCABULARY, MASK, LENGTH, ROWS = 19, 18, 32, 4
END = 3
"""The token that ends a document, where they are kept apart."""
VARIANTS: dict[str, dict[str, Any]] = {
    "deep": {"layers": 24, "dropout": 0.1, "norm": "rmsnorm", "mlp": "swiglu", "key_value_heads": 2},
    "adaln": {"layers": 3, "dropout": 0.1, "conditioning": "adaln", "conditioning_size": 16},
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was compiled before, and after."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network(variant: str, **options: Any) -> Transformer:
    config = ModelConfig(**{"context": LENGTH, "hidden": 32, "heads": 4, **VARIANTS[variant], **options})
    model = Transformer(config, VOCABULARY, MASK)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    return model.train()


def compiled(variant: str, recompute: str = "none", backend: str = "eager", **options: Any) -> Transformer:
    model = network(variant, **options)
    wrap_blocks(model.blocks.values(), recompute=recompute, compile="blocks", backend=backend)
    return model


def inputs(step: int, block_size: int = 4, documents: bool = False) -> NetworkInputs:
    rows = np.random.default_rng(step).integers(0, MASK, (ROWS, LENGTH))
    objective = BlockDiffusion(MASK, LENGTH, block_size, (0.3, 0.9), document_end=END if documents else None)
    return objective.training_inputs(rows, np.arange(ROWS), step, 0, ROWS)


def step_of(model: Transformer, given: NetworkInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(given)[0]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("variant", "recompute", "documents"),
    [("deep", "none", True), ("adaln", "none", False), ("deep", "layer", False), ("adaln", "mlp", True)],
)
def test_six_steps_are_a_graph_for_each_kind_of_layer(variant: str, recompute: str, documents: bool) -> None:
    """The last layer, which computes selected rows, and all others; no more for all the numbers of rows that are met."""
    model, plain = compiled(variant, recompute), network(variant)
    given = [inputs(step, documents=documents) for step in range(6)]
    assert len({len(one.selected) for one in given}) > 3
    for one in given:
        (loss, gradients), (expected, reference) = step_of(model, one), step_of(plain, one)
        assert torch.equal(loss, expected)
        assert all(torch.equal(gradients[name], reference[name]) for name in reference)
    halves = 2 if recompute == "mlp" else 1
    assert counters["stats"]["unique_graphs"] == 2 * halves
    assert not counters["graph_break"]


def test_each_block_size_has_its_graphs_and_they_stay() -> None:
    model = compiled("adaln")
    for turn in range(2):
        for block_size in (4, 16, LENGTH):
            model(inputs(0, block_size))[0].backward()
        assert counters["stats"]["unique_graphs"] == 3 * 2, turn


def test_sums_in_mixed_order_are_off_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of torch are a thread's own, and a backward is compiled in autograd's: it must be an option of the compilation."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    for mode in COMPILE_MODES.values():
        compiled_whole(len, mode)
    assert all(one["options"]["triton.mix_order_reduction"] is False for one in asked)
    assert [one["options"].get("max_autotune", False) for one in asked] == [
        mode.startswith("max-autotune") for mode in COMPILE_MODES.values()
    ]


def test_inductor_computes_what_eager_does() -> None:
    """Real kernels of two tiny layers, of which one is the last."""
    model, plain, given = compiled("adaln", backend="inductor", layers=2), network("adaln", layers=2), inputs(0)
    (loss, gradients), (expected, reference) = step_of(model, given), step_of(plain, given)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("documents", [False, True], ids=["texts", "documents"])
def test_flex_attention_is_inside_of_the_graph(documents: bool) -> None:
    """Its mask is made outside. (Forwards: it has no backward on a CPU.)"""
    given, options = [inputs(step, documents=documents) for step in range(3)], {"attention": "flex", "layers": 3, "heads": 2}
    model, plain = compiled("adaln", **options), network("adaln", attention="dense", layers=3, heads=2)
    with torch.no_grad():
        for one in given:
            torch.testing.assert_close(model(one)[1], plain(one)[1], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.parametrize("documents", [False, True], ids=["texts", "documents"])
def test_parts_of_a_ring_are_two_graphs_for_all_ranks(documents: bool) -> None:
    """What a rank holds, and what any other sends; each graph is a kernel that takes seconds to compile."""
    run = compiled_whole(flex_with_lse, backend="eager")
    for rank, step in itertools.product(range(4), range(4)):
        share = AttentionPattern("block_diffusion", LENGTH, 4).share(rank, 4, ring=True)
        segments = torch.arange(share.key_rows)[None] // 20 + rank
        mask = document_block_mask(share, share.rows, segments, step) if documents else block_mask(share, share.rows, segments.device, step)
        q, k = torch.ones(1, 2, share.rows, 8), torch.ones(1, 2, len(share.met(step)), 8)
        run(q, k, k, mask, enable_gqa=False, kernel_options=None)
    assert counters["stats"]["unique_graphs"] == 2


def test_what_cannot_be_one_graph_is_an_error() -> None:
    def reads(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if float(x.sum()) > 0 else x

    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled_whole(reads, backend="eager")(torch.ones(2))


def test_too_many_variants_are_an_error_and_no_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bd3_scale.compiling.VARIANTS", 3)
    double = compiled_whole(lambda x: 2 * x, backend="eager")
    for size in range(2, 5):
        double(torch.ones(size))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        double(torch.ones(9))
