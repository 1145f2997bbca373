"""Masked diffusion language models in Hugging Face form: LLaDA (dense) and Dream. Theirs is the objective `mdlm`, and so training goes on.

Both have an id of MASK among their ids. Ours is the id after those of the tokenizer: its row is theirs, bit for bit, and their id stays, as
one that no text has. Invariant: on rows of tokens and MASK our network computes their logits, without a mask of attention (`mdlm`).

Dream was made of a causal model and predicts a token in the row before it. Nothing here is shifted: what comes out at row i is the
prediction of token i + 1 until training has moved it, as with every causal model that goes on as diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bd3_scale.convert.causal import DEFAULT_CONTEXT, Described, llama, only, value_of, weights_of
from bd3_scale.convert.key_map import KeyMap, Piece, Rule
from bd3_scale.recipe.schema import ModelConfig

ABSENT = ("alibi", "include_bias", "include_qkv_bias", "attention_layer_norm", "input_emb_norm", "scale_logits", "bias_for_layer_norm")
"""Switches of LLaDA's code that its models have off."""


def _llada(config: dict[str, Any]) -> Described:
    only(config, "block_type", "llama", "llama")
    only(config, "block_group_size", 1, 1)
    only(config, "activation_type", "silu", "silu")
    only(config, "layer_norm_type", "rms", "rms")
    only(config, "rope", True, True)
    for name in ABSENT:
        only(config, name, False, False, None)
    heads = int(value_of(config, "n_heads"))
    model = ModelConfig(
        context=min(int(value_of(config, "max_sequence_length")), DEFAULT_CONTEXT),
        layers=int(value_of(config, "n_layers")),
        hidden=int(value_of(config, "d_model")),
        heads=heads,
        key_value_heads=1 if config.get("multi_query_attention") else config.get("n_kv_heads") or heads,
        norm="rmsnorm",
        norm_epsilon=float(config.get("rms_norm_eps", 1e-5)),
        mlp="swiglu",
        mlp_hidden=int(value_of(config, "mlp_hidden_size")),
        rotary_base=float(config.get("rope_theta") or 10000.0),
        tied_head=bool(config.get("weight_tying", True)),
    )
    return Described(model, _llada_map(model, int(value_of(config, "mask_token_id"))), objective="mdlm")


def _llada_map(config: ModelConfig, mask: int) -> KeyMap:
    layer = "transformer.blocks.{}"
    head = () if config.tied_head else (Rule("head.weight", (Piece("transformer.ff_out.weight"),), rows="vocabulary", mask=mask),)
    return KeyMap(
        whole=(
            Rule("embedding.weight", (Piece("transformer.wte.weight"),), rows="vocabulary", mask=mask),
            *weights_of("final_norm", "transformer.ln_f", False),
            *head,
        ),
        layer=(
            *weights_of("blocks.{}.attention_norm", f"{layer}.attn_norm", False),
            *weights_of("blocks.{}.attention.query", f"{layer}.q_proj", False),
            Rule("blocks.{}.attention.key_value.weight", tuple(Piece(f"{layer}.{p}_proj.weight") for p in "kv"), "heads"),
            *weights_of("blocks.{}.attention.output", f"{layer}.attn_out", False),
            *weights_of("blocks.{}.mlp_norm", f"{layer}.ff_norm", False),
            Rule("blocks.{}.mlp.up.weight", tuple(Piece(f"{layer}.{p}_proj.weight") for p in ("ff", "up")), "units"),
            *weights_of("blocks.{}.mlp.down", f"{layer}.ff_out", False),
        ),
        prefixes=("model.", ""),
        no_use=r"transformer\.ff_out\.weight" if config.tied_head else "$^",
    )


def _dream(config: dict[str, Any]) -> Described:
    value_of(config, "mask_token_id")
    note = "Dream predicts a token in the row before it, and this network in its own: train before you sample"
    return replace(llama(config), objective="mdlm", note=note)


FAMILIES: dict[str, Callable[[dict[str, Any]], Described]] = {"llada": _llada, "Dream": _dream}
"""model_type -> what its config.json says. Each raises CheckpointError."""
