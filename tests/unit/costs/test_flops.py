"""Counts from the configuration equal what the network really holds and computes, element for element and FLOP for FLOP."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.compiling import wrap_blocks
from bd3_scale.costs.flops import count_flops, count_parameters, peak_flops, training_flops_per_token
from bd3_scale.costs.sizes import SINUSOIDS
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.table import BlockDiffusion, NetworkInputs
from bd3_scale.recipe.schema import ModelConfig

VOCABULARY = 101
CONFIGS = {
    "plain": ModelConfig(context=32, layers=3, hidden=24, heads=4, attention="dense"),
    "grouped, swiglu, rms, tied": ModelConfig(
        context=32, layers=2, hidden=24, heads=4, key_value_heads=2, mlp="swiglu", norm="rmsnorm", tied_head=True, attention="dense"
    ),
    "paper": ModelConfig(
        context=32,
        layers=2,
        hidden=24,
        heads=4,
        mlp_bias=True,
        head_bias=True,
        conditioning="adaln",
        conditioning_size=16,
        attention="dense",
    ),
    "as gpt2": ModelConfig(
        context=32,
        layers=2,
        hidden=24,
        heads=4,
        positions="learned",
        attention_bias="all",
        norm_bias=True,
        mlp_bias=True,
        attention="dense",
    ),
    "as qwen": ModelConfig(
        context=32,
        layers=2,
        hidden=24,
        heads=4,
        key_value_heads=2,
        head_width=10,
        norm="rmsnorm",
        query_key_norm=True,
        attention_bias="query_key_value",
        attention="dense",
    ),
    "tied with bias, one layer, odd mlp": ModelConfig(
        context=32,
        layers=1,
        hidden=24,
        heads=2,
        mlp="swiglu",
        mlp_hidden=40,
        mlp_bias=True,
        tied_head=True,
        head_bias=True,
        attention="dense",
    ),
}


def network(config: ModelConfig) -> Transformer:
    model = Transformer(config, VOCABULARY, VOCABULARY - 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return model


def inputs_of(config: ModelConfig, kind: str) -> NetworkInputs:
    rows = np.random.default_rng(1).integers(0, VOCABULARY - 1, (1, config.context))
    draws = 3 if kind == "3 draws" else 1
    bd3 = BlockDiffusion(VOCABULARY - 1, config.context, 8, draws=draws).training_inputs(rows, np.arange(1), 0, 0, 1)
    if kind in ("block_diffusion", "3 draws"):
        return bd3
    length = config.context
    return NetworkInputs(
        tokens=torch.from_numpy(rows),
        positions=bd3.positions[:length],
        selected=torch.arange(length - 1),
        targets=torch.from_numpy(rows[0, 1:]),
        weights=torch.ones(length - 1),
        dropout_keys=bd3.dropout_keys,
        pattern=AttentionPattern("causal" if kind == "causal" else "full", length, 1),
        denoised=bd3.denoised,
        counted=bd3.counted,
        sparse=kind != "causal",
    )


def visible_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, attn_mask: Any = None, **rest: Any) -> int:
    """FLOPs of a masked attention call, by the mask that it is given: 4 per visible pair and channel of all heads."""
    queries, keys = q.shape[2], k.shape[2]
    causal = args[1] if len(args) > 1 else rest.get("is_causal", False)
    if attn_mask is None:
        pairs = queries * (queries + 1) // 2 if causal else queries * keys
    else:
        pairs = int((attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0).sum())
        assert attn_mask.numel() == queries * keys
    return 4 * pairs * q.shape[0] * q.shape[1] * q.shape[3]


visible_attention._get_raw = True  # type: ignore[attr-defined]

COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: visible_attention,
    torch.ops.aten.addmm_: lambda out, a, b, *args, **rest: 2 * a[0] * a[1] * b[1],
}
"""What torch's counter does not know by itself: attention on CPU, and the head's accumulating product."""


def test_parameters_are_those_of_the_network(world_of_one: object) -> None:
    """Part by part, for every combination of what has or has not parameters."""
    switches: dict[str, tuple[Any, Any]] = {
        "mlp": ("gelu", "swiglu"),
        "mlp_bias": (False, True),
        "key_value_heads": (None, 2),
        "conditioning": ("none", "adaln"),
        "tied_head": (False, True),
        "head_bias": (False, True),
        "norm": ("layernorm", "rmsnorm"),
    }
    for choice in itertools.product(*switches.values()):
        chosen = dict(zip(switches, choice, strict=True))
        config = ModelConfig(context=32, layers=2, hidden=24, heads=4, conditioning_size=16, **chosen)
        named, count = list(Transformer(config, VOCABULARY, VOCABULARY - 1).named_parameters()), count_parameters(config, VOCABULARY)
        parts = {
            "conditioning": sum(p.numel() for name, p in named if "condition." in name or "modulation." in name),
            "embedding": sum(p.numel() for name, p in named if name.startswith("embedding.")),
            "attention": sum(p.numel() for name, p in named if ".attention." in name),
            "mlp": sum(p.numel() for name, p in named if ".mlp." in name and not name.startswith("condition.")),
            "norms": sum(p.numel() for name, p in named if "norm." in name),
            "head": sum(p.numel() for name, p in named if name.startswith("head.")),
        }
        assert asdict(count) == parts, chosen
        assert count.total == sum(p.numel() for _, p in named), chosen


def test_published_small_model_has_its_published_size() -> None:
    """169.6M parameters (docs/objective.md section 6): 12 x 768, conditioning of 128, untied, V = 50258."""
    config = ModelConfig(conditioning="adaln", conditioning_size=128, mlp_bias=True, head_bias=True)
    assert round(count_parameters(config, 50258).total / 1e6, 1) == 169.6


@pytest.mark.parametrize("kind", ["block_diffusion", "3 draws", "causal", "full"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_flops_are_those_that_run(config: ModelConfig, kind: str, world_of_one: object) -> None:
    model, inputs = network(config), inputs_of(config, kind)
    count = count_flops(config, inputs.pattern, VOCABULARY, len(inputs.selected) / inputs.pattern.draws / (config.context - 1))
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
        model(inputs)
    ran = counter.get_flop_counts()["Global"]
    assert ran.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu) == count.attention
    assert sum(ran.values()) - conditioning(config) == pytest.approx(count.projections + count.mlp + count.head, rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_is_three_forwards_of_the_products(config: ModelConfig, world_of_one: object) -> None:
    model, inputs = network(config), inputs_of(config, "block_diffusion")
    count = count_flops(config, inputs.pattern, VOCABULARY, len(inputs.selected) / (config.context - 1))
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(inputs)[0].backward()
    ran = counter.get_flop_counts()["Global"]
    attention = ran.pop(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    products = sum(ran.values()) - 3 * conditioning(config)
    # The sinusoids have no gradient: one product less than three per forward one.
    products += 2 * SINUSOIDS * config.conditioning_size if config.conditioning == "adaln" else 0
    assert products + 3 * attention == pytest.approx(count.model, rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_recomputation_adds_a_forward_of_the_layers_and_not_of_the_head(config: ModelConfig, world_of_one: object) -> None:
    """Also of a half of them: what runs where nothing but the input of the part is kept."""
    inputs = inputs_of(config, "block_diffusion")
    share, ran, expected = len(inputs.selected) / (config.context - 1), {}, {}
    for recompute in ("none", "attention", "mlp", "layer"):
        model = network(config)
        wrap_blocks(model.blocks.values(), recompute=recompute, compile="none")
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            model(inputs)[0].backward()
        ran[recompute] = counter.get_total_flops()
        expected[recompute] = training_flops_per_token(config, inputs.pattern, VOCABULARY, share, recompute) * config.context
    modulations = 2 * 6 * config.layers * config.conditioning_size * config.hidden if config.conditioning == "adaln" else 0
    ran["layer"] -= modulations
    for recompute, number in ran.items():
        assert number - ran["none"] == pytest.approx(expected[recompute] - expected["none"], rel=1e-12)
    assert ran["none"] < ran["mlp"] < ran["layer"] == ran["mlp"] + ran["attention"] - ran["none"]


def test_cost_against_autoregression_is_the_known_one() -> None:
    """The floor is 1.49 at 124M; it rises with the share of the layers, towards 2."""
    small, large = ModelConfig(tied_head=True), ModelConfig(layers=24, hidden=2048, heads=16, context=2048)

    def ratio(config: ModelConfig) -> float:
        bd3 = AttentionPattern("block_diffusion", config.context, 16)
        causal = AttentionPattern("causal", config.context, 1)
        return training_flops_per_token(config, bd3, 50258, 0.5) / training_flops_per_token(config, causal, 50258, 1.0)

    assert ratio(small) == pytest.approx(1.494, abs=0.005)
    assert ratio(small) < ratio(large) < 2


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L40", "bf16", 181.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GeForce RTX 3090", "bf16", 71.0),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
    ],
)
def test_peak_is_that_of_the_part_named(name: str, precision: str, tera: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name", ["Intel Xeon", "", "NVIDIA RTX A1000", "NVIDIA H20", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_peak_of_an_unknown_part_is_not_guessed(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp8") is None
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None, "it has no bf16 units"


def conditioning(config: ModelConfig) -> int:
    """FLOPs of the one condition vector of a forward, which the counts leave out."""
    if config.conditioning != "adaln":
        return 0
    size = config.conditioning_size
    return 2 * (SINUSOIDS * size + size * size + (6 * config.layers + 2) * size * config.hidden)
