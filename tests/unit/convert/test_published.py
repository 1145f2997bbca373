"""The paper's published weights: a random state of their names and of tiny shapes, against a small forward written from the
description of the network (LayerNorm in fp32, fused q, k, v, GELU, adaLN at sigma = 0), independent of our network."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern, dense
from bd3_scale.generation.load_model import LoadedNetwork, load_network
from bd3_scale.objectives.table import BlockDiffusion
from tools import convert_checkpoint

pytestmark = pytest.mark.usefixtures("world_of_one")

HIDDEN, HEADS, LAYERS, CONDITION, IDS, LENGTH, BLOCK = 24, 2, 2, 16, 258, 16, 4
MASK = IDS - 1


def state(prefix: str = "backbone.", conditioned: bool = True) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (IDS, HIDDEN),
        "output_layer.linear.weight": (IDS, HIDDEN),
        "output_layer.linear.bias": (IDS,),
        "output_layer.norm_final.weight": (HIDDEN,),
    }
    if conditioned:
        shapes |= {"sigma_map.mlp.0.weight": (CONDITION, 256), "sigma_map.mlp.0.bias": (CONDITION,)}
        shapes |= {"sigma_map.mlp.2.weight": (CONDITION, CONDITION), "sigma_map.mlp.2.bias": (CONDITION,)}
        shapes |= {"output_layer.adaLN_modulation.weight": (2 * HIDDEN, CONDITION), "output_layer.adaLN_modulation.bias": (2 * HIDDEN,)}
    for i in range(LAYERS):
        block = {
            "norm1.weight": (HIDDEN,),
            "attn_qkv.weight": (3 * HIDDEN, HIDDEN),
            "attn_out.weight": (HIDDEN, HIDDEN),
            "norm2.weight": (HIDDEN,),
            "mlp.0.weight": (4 * HIDDEN, HIDDEN),
            "mlp.0.bias": (4 * HIDDEN,),
            "mlp.2.weight": (HIDDEN, 4 * HIDDEN),
            "mlp.2.bias": (HIDDEN,),
        }
        if conditioned:
            block |= {"adaLN_modulation.weight": (6 * HIDDEN, CONDITION), "adaLN_modulation.bias": (6 * HIDDEN,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    return {prefix + name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name) for name, shape in shapes.items()}


def reference(state: dict[str, Tensor], tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Logits fp64 [batch, rows, V], from the description alone. tokens [batch, rows], mask bool [rows, rows]."""
    w = {name.removeprefix("backbone."): value.double() for name, value in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = positions.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)

    conditioned = "sigma_map.mlp.0.weight" in w
    if conditioned:
        waves = torch.cat([torch.ones(128), torch.zeros(128)]).double()  # cos and sin of sigma = 0
        c = (
            w["sigma_map.mlp.2.weight"] @ F.silu(w["sigma_map.mlp.0.weight"] @ waves + w["sigma_map.mlp.0.bias"])
            + w["sigma_map.mlp.2.bias"]
        )
        c = F.silu(c)

    def chunks(name: str, count: int) -> list[Any]:
        if not conditioned:
            return [0.0, 0.0, 1.0] * (count // 3) if count == 6 else [0.0, 0.0]
        return list((w[f"{name}.weight"] @ c + w[f"{name}.bias"]).chunk(count))

    x = w["vocab_embed.embedding"][tokens]
    for i in range(LAYERS):
        b = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks(f"{b}.adaLN_modulation", 6)
        h = norm(x, f"{b}.norm1.weight") * (1 + scale_a) + shift_a
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in (h @ w[f"{b}.attn_qkv.weight"].T).chunk(3, -1))
        scores = torch.einsum("bihd,bjhd->bhij", turn(q), turn(k)) / math.sqrt(HIDDEN // HEADS)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        out = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        x = x + gate_a * (out @ w[f"{b}.attn_out.weight"].T)
        h = norm(x, f"{b}.norm2.weight") * (1 + scale_m) + shift_m
        h = F.gelu(h @ w[f"{b}.mlp.0.weight"].T + w[f"{b}.mlp.0.bias"], approximate="tanh")
        x = x + gate_m * (h @ w[f"{b}.mlp.2.weight"].T + w[f"{b}.mlp.2.bias"])
    shift, scale = chunks("output_layer.adaLN_modulation", 2)
    x = norm(x, "output_layer.norm_final.weight") * (1 + scale) + shift
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def ours(loaded: LoadedNetwork) -> tuple[Tensor, Tensor, AttentionPattern]:
    """(logits of the noisy half under the training forward, the tokens that went in, the pattern)."""
    data = np.random.default_rng(0).integers(0, MASK, (2, LENGTH))
    given = BlockDiffusion(MASK, LENGTH, BLOCK, (0.3, 0.9)).training_inputs(data, np.arange(2), 0, 0, 2)
    every = torch.arange(2 * LENGTH)
    seen: list[Tensor] = []
    hook = loaded.network.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        loaded.network(replace(given, selected=every, targets=torch.zeros_like(every), weights=torch.ones(len(every))))
        hook.remove()
        return loaded.network.head(seen[0]).unflatten(0, (2, LENGTH)), given.tokens, given.pattern


def assert_same_logits(run: Path, weights: dict[str, Tensor]) -> LoadedNetwork:
    loaded = load_network(run, device="cpu")
    found, tokens, pattern = ours(loaded)
    positions = torch.arange(pattern.rows) % LENGTH
    expected = reference(weights, tokens, positions, dense(pattern, torch.device("cpu")))[:, :LENGTH]
    torch.testing.assert_close(found[..., :MASK].double(), expected[..., :MASK], rtol=1e-5, atol=1e-5)
    return loaded


def convert(*arguments: Any) -> int:
    return convert_checkpoint.main([*(str(argument) for argument in arguments), "--tokenizer", "bytes"])


def test_hugging_face_form_with_its_tuned_interval(tmp_path: Path) -> None:
    weights = state()
    buffers = {"sampling_eps_min": torch.tensor(0.45), "sampling_eps_max": torch.tensor(0.95)}
    (tmp_path / "hf").mkdir()
    save_file({**weights, **buffers}, tmp_path / "hf" / "model.safetensors")
    config = {"model_type": "bd3lm", "n_heads": HEADS, "model_length": LENGTH, "block_size": BLOCK}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 0
    loaded = assert_same_logits(tmp_path / "run", weights)
    assert loaded.checkpoint.run["tuner"] == {"block_size": BLOCK, "interval": [0.45, 0.95], "history": []}
    assert loaded.objective.block_size == BLOCK and list(loaded.recipe.objective.interval) == [0.45, 0.95]
    assert loaded.recipe.model.conditioning_size == CONDITION


def test_lightning_checkpoint_without_executing_its_pickle(tmp_path: Path) -> None:
    weights = state()
    document = {"state_dict": weights, "global_step": 7, "hyper_parameters": {"config": {"model": {"n_heads": HEADS, "length": LENGTH}}}}
    torch.save(document, tmp_path / "last.ckpt")
    assert convert("import", tmp_path / "last.ckpt", tmp_path / "run", "--block-size", BLOCK) == 0
    assert_same_logits(tmp_path / "run", weights)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state(), "loops": Evil()}, "last.ckpt")
    assert convert("import", "last.ckpt", "run", "--block-size", BLOCK) == 1
    assert "without executing its pickle" in capsys.readouterr().err and not Path("executed").exists()


@pytest.mark.parametrize("kind", ["mdlm", "ar", "bd3"])
def test_what_the_other_networks_were_trained_for(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = state("" if kind == "mdlm" else "backbone.", conditioned=kind != "ar")
    (tmp_path / "hf").mkdir()
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    config = {"mdlm": {"model_type": "mdlm"}, "ar": {"model_type": "bd3lm", "causal": True}, "bd3": {"model_type": "bd3lm"}}[kind]
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"n_heads": HEADS, "model_length": LENGTH, **config}))
    if kind == "bd3":
        assert convert("import", tmp_path / "hf", tmp_path / "run") == 1
        assert "--block-size" in capsys.readouterr().err
        assert convert("import", tmp_path / "hf", tmp_path / "run", "--block-size", LENGTH) == 0
        assert load_network(tmp_path / "run", device="cpu").objective.block_size == LENGTH
        return
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 0
    assert assert_same_logits(tmp_path / "run", weights).objective.kind == kind
