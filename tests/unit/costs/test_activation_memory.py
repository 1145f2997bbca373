"""What a forward keeps is what the formula says, for every part that the network can have; what is under way, as the schedules have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.compiling import wrap_blocks
from bd3_scale.costs import activation_memory
from bd3_scale.costs.activation_memory import Batch, kept_bytes, most_bytes, under_way
from bd3_scale.engines.initialise import initialise
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import Autoregressive, BlockDiffusion, MaskedDiffusion, ScoreEntropy
from bd3_scale.recipe.schema import ModelConfig, ParallelConfig
from tests.alive import Alive

V, CONTEXT, ROWS = 503, 256, 2
PLAIN = ModelConfig(context=CONTEXT, layers=3, hidden=64, heads=4)
LLAMA = replace(PLAIN, norm="rmsnorm", mlp="swiglu", key_value_heads=2)
OLMO = replace(LLAMA, query_key_norm=True, query_key_norm_width="heads", norm_place="after")
GEMMA = replace(LLAMA, mlp="geglu", query_key_norm=True, norm_place="both", rotary_local=[500.0, 2])
PAPER = replace(PLAIN, conditioning="adaln", conditioning_size=16, dropout=0.1, mlp_bias=True, head_bias=True)
CASES: dict[str, tuple[ModelConfig, str, str, bool]] = {
    # name: (model, objective, recomputation, bf16)
    "plain": (PLAIN, "bd3", "none", False),
    "plain, recomputed": (PLAIN, "bd3", "layer", False),
    "plain, bf16": (PLAIN, "bd3", "none", True),
    "llama": (LLAMA, "bd3", "none", False),
    "plain, attention recomputed": (PLAIN, "bd3", "attention", False),
    "llama, MLPs recomputed": (LLAMA, "bd3", "mlp", False),
    "paper, bf16, attention recomputed": (PAPER, "bd3", "attention", True),
    "paper, bf16, MLPs recomputed": (PAPER, "bd3", "mlp", True),
    "llama, bf16, recomputed": (LLAMA, "bd3", "layer", True),
    "paper": (PAPER, "bd3", "none", False),
    "paper, bf16": (PAPER, "bd3", "none", True),
    "gpt2": (replace(PLAIN, positions="learned", attention_bias="all", norm_bias=True), "bd3", "none", False),
    "qwen3, bf16": (replace(LLAMA, query_key_norm=True), "bd3", "none", True),
    "olmo2": (OLMO, "bd3", "none", False),
    "gemma3, bf16": (GEMMA, "bd3", "none", True),
    "dense": (replace(PLAIN, attention="dense"), "bd3", "none", False),
    "3 draws": (LLAMA, "3 draws", "none", False),
    "mdlm": (PLAIN, "mdlm", "none", False),
    "mdlm, qwen3, bf16": (replace(LLAMA, query_key_norm=True), "mdlm", "none", True),
    "mdlm, gemma3": (GEMMA, "mdlm", "none", False),
    "mdlm, olmo2, bf16": (OLMO, "mdlm", "none", True),
    "mdlm, llama, recomputed": (LLAMA, "mdlm", "layer", False),
    "sedd": (PAPER, "sedd", "none", False),
    "sedd, bf16, MLPs recomputed": (PAPER, "sedd", "mlp", True),
    "ar": (LLAMA, "ar", "none", False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_forward_keeps_what_the_formula_says(name: str, world_of_one: object, record_property: Callable[[str, object], None]) -> None:
    config, kind, recompute, bf16 = CASES[name]
    model = Transformer(config, V, V - 1)
    initialise(model, config, seed=0)
    model = model.to(torch.bfloat16 if bf16 else torch.float32).train()
    wrap_blocks(model.blocks.values(), recompute=recompute, compile="none")
    objective = {
        "bd3": lambda: BlockDiffusion(V - 1, CONTEXT, 16),
        "3 draws": lambda: BlockDiffusion(V - 1, CONTEXT, 16, draws=3),
        "mdlm": lambda: MaskedDiffusion(V - 1, CONTEXT),
        "sedd": lambda: ScoreEntropy(V - 1, CONTEXT),
        "ar": lambda: Autoregressive(V - 1, CONTEXT),
    }[kind]()
    rows = np.random.default_rng(0).integers(0, V - 1, (ROWS, CONTEXT))
    inputs = objective.training_inputs(rows, np.arange(ROWS), 0, 0, ROWS)
    model(inputs)[0].backward()  # masks that are made once are made
    model.zero_grad()
    with Alive([*model.parameters(), inputs.tokens, inputs.selected, inputs.targets, inputs.weights]) as alive:
        answer = model(inputs)
        measured = alive.bytes()
    assert answer[0].isfinite()
    batch = Batch(
        config,
        inputs.pattern,
        ROWS,
        len(inputs.selected),
        weight=2 if bf16 else 4,
        kind=objective.traits,
    )
    expected = kept_bytes(batch, range(3), V, recompute=recompute, pipeline=False, interleaved=False).total
    record_property("table", f"activations, {name:24s} {measured / 2**20:6.2f} MiB measured, {expected / 2**20:6.2f} by the formula")
    assert expected == pytest.approx(measured, rel=0.03)


def test_flex_attention_keeps_less_than_the_tiles_and_more_than_recomputation() -> None:
    pattern = BlockDiffusion(V - 1, CONTEXT, 16).pattern
    cpu, cuda = (Batch(PLAIN, pattern, ROWS, 100, weight=2, device=device) for device in ("cpu", "cuda"))
    tiled, flex = (kept_bytes(batch, range(3), V, recompute="none", pipeline=False, interleaved=False).layers for batch in (cpu, cuda))
    again = kept_bytes(cuda, range(3), V, recompute="layer", pipeline=False, interleaved=False).layers
    assert again < flex < tiled


def test_of_a_ring_each_rank_keeps_its_part_and_of_what_is_gathered_more() -> None:
    pattern = BlockDiffusion(V - 1, CONTEXT, 16).pattern
    one, gathered, ring = (
        kept_bytes(
            Batch(PLAIN, part, ROWS, ROWS * part.length // 2), range(3), V, recompute="none", pipeline=False, interleaved=False
        ).layers
        for part in (pattern, pattern.share(0, 4), pattern.share(0, 4, ring=True))
    )
    assert ring == pytest.approx(one / 4, rel=0.05) and gathered > 1.05 * one / 4


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 12))
def test_a_schedule_runs_everything_once_and_early_stages_hold_the_most(pipeline: int, virtual: int, more: int) -> None:
    virtual = virtual if pipeline > 1 else 1
    parallel, micro_batches = ParallelConfig(pipeline=pipeline, virtual_stages=virtual), pipeline + more
    most = []
    for rank in range(pipeline):
        states = list(under_way(parallel, rank, micro_batches))
        assert len(states) == micro_batches * virtual, "one for each forward"
        assert all(0 <= count <= micro_batches for state in states for count in state.values())
        most.append(max(sum(state.values()) for state in states))
    assert most == sorted(most, reverse=True)
    if virtual == 1:
        assert most == [min(pipeline - rank, micro_batches) for rank in range(pipeline)]


def test_a_rank_holds_its_fullest_moment() -> None:
    kept = [activation_memory.Kept(10, 0, 0), activation_memory.Kept(1, 5, 0)]
    parallel = ParallelConfig(pipeline=2, virtual_stages=2)
    # The last rank: two forwards of its first chunk, then forward and backward of the last chunk in turns; the head one at a time.
    assert most_bytes(kept, parallel, 1, 2).total == 2 * 10 + 6
    assert most_bytes(kept[:1], ParallelConfig(pipeline=2), 0, 4).total == 2 * 10
