"""Causal language models in Hugging Face form: GPT-2, and the family of Llama (Llama, Mistral, Qwen2, Qwen3).

`describe` reads config.json into our `ModelConfig` and the table of names. Whatever a config says that our network does not
compute (scaled rotary positions, sliding windows, other activations) is refused by its name. Not taken over: dropout rates,
which are the recipe's, and GPT-2's dropout of the embedding, which we do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bd3_scale.convert.key_map import KeyMap, Piece, Rule
from bd3_scale.errors import CheckpointError
from bd3_scale.recipe.schema import ModelConfig

DEFAULT_CONTEXT = 1024
"""Tokens per row of the recipe, where the model can do as many and nothing else is asked for."""


def _weights(ours: str, theirs: str, bias: bool, transposed: bool = False, part: tuple[int, int] = (0, 1)) -> tuple[Rule, ...]:
    """A linear or a norm: weight (turned where it is stored [in, out]) and, perhaps, bias."""
    weight = Rule(f"{ours}.weight", (Piece(f"{theirs}.weight", transposed, part),))
    return (weight, Rule(f"{ours}.bias", (Piece(f"{theirs}.bias", False, part),))) if bias else (weight,)


def _gpt2_map(tied: bool) -> KeyMap:
    attention = "h.{}.attn.c_attn"
    key_values = tuple(
        Rule(f"blocks.{{}}.attention.key_value.{what}", tuple(Piece(f"{attention}.{what}", turned, (i, 3)) for i in (1, 2)), "heads")
        for what, turned in (("weight", True), ("bias", False))
    )
    return KeyMap(
        whole=(
            Rule("embedding.weight", (Piece("wte.weight"),), rows="vocabulary"),
            Rule("positions.weight", (Piece("wpe.weight"),), rows="positions"),
            *_weights("final_norm", "ln_f", True),
            *(() if tied else (Rule("head.weight", (Piece("/lm_head.weight"),), rows="vocabulary"),)),
        ),
        layer=(
            *_weights("blocks.{}.attention_norm", "h.{}.ln_1", True),
            *_weights("blocks.{}.attention.query", attention, True, transposed=True, part=(0, 3)),
            *key_values,
            *_weights("blocks.{}.attention.output", "h.{}.attn.c_proj", True, transposed=True),
            *_weights("blocks.{}.mlp_norm", "h.{}.ln_2", True),
            *_weights("blocks.{}.mlp.up", "h.{}.mlp.c_fc", True, transposed=True),
            *_weights("blocks.{}.mlp.down", "h.{}.mlp.c_proj", True, transposed=True),
        ),
        prefixes=("transformer.", ""),
        no_use=r"h\.\d+\.attn\.(bias|masked_bias)" + (r"|lm_head\.weight" if tied else ""),
    )


def llama_map(config: ModelConfig) -> KeyMap:
    """Names of the family of Llama, of a network that has no more than theirs."""
    attention, qkv, mlp = "layers.{}.self_attn", config.attention_bias != "none", config.mlp_bias
    kinds = [("weight", True), ("bias", qkv)]
    key_values = tuple(
        Rule(f"blocks.{{}}.attention.key_value.{what}", tuple(Piece(f"{attention}.{p}_proj.{what}") for p in "kv"), "heads")
        for what, there in kinds
        if there
    )
    ups = tuple(
        Rule(f"blocks.{{}}.mlp.up.{what}", tuple(Piece(f"layers.{{}}.mlp.{p}_proj.{what}") for p in ("gate", "up")), "units")
        for what, there in [("weight", True), ("bias", mlp)]
        if there
    )
    norms = tuple(
        Rule(f"blocks.{{}}.attention.{ours}_norm.weight", (Piece(f"{attention}.{theirs}_norm.weight"),))
        for ours, theirs in (("query", "q"), ("key", "k"))
    )
    head = () if config.tied_head else (Rule("head.weight", (Piece("/lm_head.weight"),), rows="vocabulary"),)
    return KeyMap(
        whole=(Rule("embedding.weight", (Piece("embed_tokens.weight"),), rows="vocabulary"), *_weights("final_norm", "norm", False), *head),
        layer=(
            *_weights("blocks.{}.attention_norm", "layers.{}.input_layernorm", False),
            *_weights("blocks.{}.attention.query", f"{attention}.q_proj", qkv),
            *key_values,
            *_weights("blocks.{}.attention.output", f"{attention}.o_proj", config.attention_bias == "all"),
            *(norms if config.query_key_norm else ()),
            *_weights("blocks.{}.mlp_norm", "layers.{}.post_attention_layernorm", False),
            *ups,
            *_weights("blocks.{}.mlp.down", "layers.{}.mlp.down_proj", mlp),
        ),
        prefixes=("model.", ""),
        no_use=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq" + (r"|lm_head\.weight" if config.tied_head else ""),
    )


def _gpt2(config: dict[str, Any]) -> tuple[ModelConfig, KeyMap, int]:
    _only(config, "activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    _only(config, "scale_attn_weights", True, True)
    _only(config, "scale_attn_by_inverse_layer_idx", False, False)
    _only(config, "add_cross_attention", False, False)
    longest = int(_value(config, "n_positions"))
    tied = bool(config.get("tie_word_embeddings", True))
    model = ModelConfig(
        context=min(longest, DEFAULT_CONTEXT),
        layers=int(_value(config, "n_layer")),
        hidden=int(_value(config, "n_embd")),
        heads=int(_value(config, "n_head")),
        mlp_hidden=config.get("n_inner"),
        mlp_bias=True,
        positions="learned",
        attention_bias="all",
        norm_bias=True,
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
        tied_head=tied,
    )
    return model, _gpt2_map(tied), longest


def _llama(config: dict[str, Any]) -> tuple[ModelConfig, KeyMap, int]:
    kind = config["model_type"]
    _only(config, "hidden_act", "silu", "silu")
    _only(config, "partial_rotary_factor", 1.0, 1.0)
    _only(config, "pretraining_tp", 1, 1)
    _unscaled(config)
    if config.get("sliding_window") and (kind == "mistral" or config.get("use_sliding_window")):
        raise _unsupported("sliding_window", config["sliding_window"])
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise _unsupported("layer_types", config["layer_types"])
    biases = "query_key_value" if kind == "qwen2" else "all" if config.get("attention_bias") else "none"
    hidden, heads = int(_value(config, "hidden_size")), int(_value(config, "num_attention_heads"))
    width = config.get("head_dim") or (128 if kind == "qwen3" else None)
    longest = int(_value(config, "max_position_embeddings"))
    model = ModelConfig(
        context=min(longest, DEFAULT_CONTEXT),
        layers=int(_value(config, "num_hidden_layers")),
        hidden=hidden,
        heads=heads,
        key_value_heads=config.get("num_key_value_heads"),
        head_width=width if width and width * heads != hidden else None,
        norm="rmsnorm",
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        mlp="swiglu",
        mlp_hidden=int(_value(config, "intermediate_size")),
        mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
        attention_bias=biases,
        query_key_norm=kind == "qwen3",
        rotary_base=_rotary_base(config),
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )
    return model, llama_map(model), longest


FAMILIES: dict[str, Callable[[dict[str, Any]], tuple[ModelConfig, KeyMap, int]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
}
"""model_type -> config.json to (model, names, longest context that the weights can do)."""


def describe(config: dict[str, Any]) -> tuple[ModelConfig, KeyMap, int]:
    """Our model, the table of names and the longest context, of a config.json. Raises CheckpointError."""
    return FAMILIES[config["model_type"]](config)


def _rotary_base(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters")  # where newer versions of transformers write it
    base = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return float(base or config.get("rope_theta") or 10000.0)


def _unscaled(config: dict[str, Any]) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if isinstance(scaling, dict):
            kind = scaling.get("rope_type", scaling.get("type", "default"))
            if kind != "default":
                raise CheckpointError(
                    f"config.json has {key} of type {kind!r}, and this network's rotary positions are not scaled; take a model without it "
                    "(a base model of the same family before its context was extended)"
                )
            if scaling.get("partial_rotary_factor", 1.0) != 1.0:
                raise _unsupported(f"{key}.partial_rotary_factor", scaling["partial_rotary_factor"])


def _only(config: dict[str, Any], key: str, default: Any, *allowed: Any) -> None:
    value = config.get(key, default)
    if value not in allowed:
        raise _unsupported(key, value)


def _unsupported(key: str, value: Any) -> CheckpointError:
    return CheckpointError(f"config.json has {key} = {value!r}, which this network does not compute; take a model without it")


def _value(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(f"config.json has no {key}; take the config.json that belongs to the weights")
    return config[key]
