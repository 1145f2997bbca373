"""Causal language models in Hugging Face form: GPT-2, and the family of Llama (Gemma 3, Llama, Mistral, OLMo 2, Qwen2, Qwen3, SmolLM3).

A row of `FAMILIES` reads config.json into our `ModelConfig` and the table of names. Whatever a config says that our network does not
compute (other activations, rotary positions scaled otherwise than Llama's) is refused by its name, and families that differ throughout
by what they have (`REFUSED`). What is a factor in a network and not in ours goes into the weights (Gemma 3). A sliding window is no
difference to rows that are not longer: it limits the context. Not taken over: dropout rates, which are the recipe's, and GPT-2's dropout
of the embedding, which we do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bd3_scale.convert.key_map import KeyMap, Piece, Rule
from bd3_scale.errors import CheckpointError
from bd3_scale.recipe.schema import ModelConfig

DEFAULT_CONTEXT = 1024
"""Tokens per row of the recipe, where the model can do as many and nothing else is asked for."""


@dataclass(frozen=True)
class Described:
    """What a config.json says."""

    model: ModelConfig
    names: KeyMap
    longest: int | None = None
    """Tokens of a row that the weights can do; None: any number."""
    objective: str = "bd3"
    """How training goes on where nothing else is asked for."""
    note: str = ""
    """What whoever goes on from these weights should know."""


def weights_of(ours: str, theirs: str, bias: bool, transposed: bool = False, part: tuple[int, int] = (0, 1)) -> tuple[Rule, ...]:
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
            *weights_of("final_norm", "ln_f", True),
            *(() if tied else (Rule("head.weight", (Piece("/lm_head.weight"),), rows="vocabulary"),)),
        ),
        layer=(
            *weights_of("blocks.{}.attention_norm", "h.{}.ln_1", True),
            *weights_of("blocks.{}.attention.query", attention, True, transposed=True, part=(0, 3)),
            *key_values,
            *weights_of("blocks.{}.attention.output", "h.{}.attn.c_proj", True, transposed=True),
            *weights_of("blocks.{}.mlp_norm", "h.{}.ln_2", True),
            *weights_of("blocks.{}.mlp.up", "h.{}.mlp.c_fc", True, transposed=True),
            *weights_of("blocks.{}.mlp.down", "h.{}.mlp.c_proj", True, transposed=True),
        ),
        prefixes=("transformer.", ""),
        no_use=r"h\.\d+\.attn\.(bias|masked_bias)" + (r"|lm_head\.weight" if tied else ""),
    )


def llama_map(config: ModelConfig, mask: int | None = None) -> KeyMap:
    """Names of the family of Llama, of a network that has no more than theirs. `mask`: their id of MASK, where they have one."""
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
    attention_norm, mlp_norm = {
        "before": ("input_layernorm", "post_attention_layernorm"),
        "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "both": ("input_layernorm", "pre_feedforward_layernorm"),
    }[config.norm_place]
    behind = (("attention", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")) if config.norm_place == "both" else ()
    second = tuple(rule for half, name in behind for rule in weights_of(f"blocks.{{}}.{half}_output_norm", f"layers.{{}}.{name}", False))
    head = () if config.tied_head else (Rule("head.weight", (Piece("/lm_head.weight"),), rows="vocabulary", mask=mask),)
    embedding = Rule("embedding.weight", (Piece("embed_tokens.weight"),), rows="vocabulary", mask=mask)
    return KeyMap(
        whole=(embedding, *weights_of("final_norm", "norm", False), *head),
        layer=(
            *weights_of("blocks.{}.attention_norm", f"layers.{{}}.{attention_norm}", False),
            *weights_of("blocks.{}.attention.query", f"{attention}.q_proj", qkv),
            *key_values,
            *weights_of("blocks.{}.attention.output", f"{attention}.o_proj", config.attention_bias == "all"),
            *(norms if config.query_key_norm else ()),
            *weights_of("blocks.{}.mlp_norm", f"layers.{{}}.{mlp_norm}", False),
            *second,
            *ups,
            *weights_of("blocks.{}.mlp.down", "layers.{}.mlp.down_proj", mlp),
        ),
        prefixes=("model.", ""),
        no_use=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq" + (r"|lm_head\.weight" if config.tied_head else ""),
    )


def _gpt2(config: dict[str, Any]) -> Described:
    only(config, "activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    only(config, "scale_attn_weights", True, True)
    only(config, "scale_attn_by_inverse_layer_idx", False, False)
    only(config, "add_cross_attention", False, False)
    longest = int(value_of(config, "n_positions"))
    tied = bool(config.get("tie_word_embeddings", True))
    model = ModelConfig(
        context=min(longest, DEFAULT_CONTEXT),
        layers=int(value_of(config, "n_layer")),
        hidden=int(value_of(config, "n_embd")),
        heads=int(value_of(config, "n_head")),
        mlp_hidden=config.get("n_inner"),
        mlp_bias=True,
        positions="learned",
        attention_bias="all",
        norm_bias=True,
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
        tied_head=tied,
    )
    return Described(model, _gpt2_map(tied), longest)


def llama(config: dict[str, Any]) -> Described:
    """Of Llama and those that differ by a switch; Dream (diffusion.py) among them."""
    kind = config["model_type"]
    only(config, "hidden_act", "silu", "silu")
    only(config, "partial_rotary_factor", 1.0, 1.0)
    only(config, "pretraining_tp", 1, 1)
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"} or ("sliding_attention" in kinds and not window):
        raise unsupported("layer_types", config["layer_types"])
    biases = "query_key_value" if kind in ("qwen2", "Dream") else "all" if config.get("attention_bias") else "none"
    hidden, heads = int(value_of(config, "hidden_size")), int(value_of(config, "num_attention_heads"))
    width = config.get("head_dim") or (128 if kind == "qwen3" else None)
    layers = int(value_of(config, "num_hidden_layers"))
    model = ModelConfig(
        context=min(int(value_of(config, "max_position_embeddings")), int(window or DEFAULT_CONTEXT), DEFAULT_CONTEXT),
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=config.get("num_key_value_heads"),
        head_width=width if width and width * heads != hidden else None,
        norm="rmsnorm",
        norm_place="after" if kind == "olmo2" else "before",
        norm_epsilon=float(config.get("rms_norm_eps", 1e-5 if kind == "olmo2" else 1e-6)),
        mlp="swiglu",
        mlp_hidden=int(value_of(config, "intermediate_size")),
        mlp_bias=bool(config.get("mlp_bias", False)) and kind in ("llama", "smollm3"),
        attention_bias=biases,
        query_key_norm=kind in ("qwen3", "olmo2"),
        query_key_norm_width="heads" if kind == "olmo2" else "head",
        rotary_base=rotary_base(config),
        rotary_scaling=_rotary_scaling(config),
        unrotated_every=_unrotated_every(config, layers) if kind == "smollm3" else None,
        tied_head=bool(config.get("tie_word_embeddings", kind == "smollm3")),
    )
    return Described(model, llama_map(model, config.get("mask_token_id") if kind == "Dream" else None), window)


def _gemma3(config: dict[str, Any]) -> Described:
    """The network of Llama with norms before and behind, GEGLU, and layers of two rotary bases, of which those with a window have the
    local one. Its factors go into the weights: norms store w and multiply by 1 + w; embedded words are multiplied by sqrt(hidden), which a
    tied head has not, so that the final norm takes it back; scores are divided by sqrt(query_pre_attn_scalar), not of a head's width."""
    only(config, "hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    only(config, "attn_logit_softcapping", None, None)
    only(config, "final_logit_softcapping", None, None)
    only(config, "use_bidirectional_attention", False, False, None)
    if bases := config.get("rope_parameters") or {}:  # where newer versions of transformers write it
        full, local = (value_of(bases, kind, "rope_parameters") for kind in ("full_attention", "sliding_attention"))
        if _rotary_scaling({"rope_parameters": local}) is not None:
            raise unsupported("rope_parameters.sliding_attention", local)
        config = {**config, "rope_parameters": full, "rope_local_base_freq": local.get("rope_theta")}
    layers, pattern = int(value_of(config, "num_hidden_layers")), int(config.get("sliding_window_pattern") or 6)
    kinds = config.get("layer_types") or ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    every = _every(config, "layer_types", [kind == "full_attention" for kind in kinds], layers) or layers + 1
    tied = bool(config.get("tie_word_embeddings", True))
    config = {"rope_theta": 1e6, "head_dim": 256, **config, "layer_types": kinds, "tie_word_embeddings": tied}
    found = llama({**config, "use_sliding_window": every > 1})
    base, size = float(config.get("rope_local_base_freq") or 10000.0), found.model.head_size
    model = replace(found.model, norm_place="both", mlp="geglu", query_key_norm=True, rotary_local=[base, every] if every > 1 else None)
    root = model.hidden**0.5
    times = {"embedding.weight": root, "final_norm.weight": 1 / root if tied else 1.0}
    if (scalar := float(config.get("query_pre_attn_scalar", 256))) <= 0:
        raise unsupported("query_pre_attn_scalar", scalar)
    times["blocks.{}.attention.query_norm.weight"] = (size / scalar) ** 0.5

    def stored(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(replace(rule, plus=float("norm" in rule.name), times=times.get(rule.name, 1.0)) for rule in rules)

    names = llama_map(model)
    return Described(model, replace(names, whole=stored(names.whole), layer=stored(names.layer)), found.longest)


FAMILIES: dict[str, Callable[[dict[str, Any]], Described]] = {
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "llama": llama,
    "mistral": llama,
    "olmo2": llama,
    "qwen2": llama,
    "qwen3": llama,
    "smollm3": llama,
}
"""model_type -> what its config.json says. Each raises CheckpointError."""
REFUSED = {
    "gemma": "scales its embedding (sqrt(hidden_size)) and multiplies by 1 + w in norms (of its kin only Gemma 3 is read)",
    "gemma2": "caps its logits (attn_logit_softcapping, final_logit_softcapping), those of attention inside of its kernel",
    "gemma3": "has images (its text models, gemma3_text, have none)",
    "olmo3": "has layers that differ in window and rotary scaling (layer_types)",
    "phi3": "has fused projections of its own (qkv_proj, gate_up_proj) and longrope scaling",
}
"""model_type -> what its network has and ours does not compute."""


def rotary_base(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters")  # where newer versions of transformers write it
    base = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return float(base or config.get("rope_theta") or 10000.0)


def _rotary_scaling(config: dict[str, Any]) -> list[float] | None:
    """The four numbers, as Llama 3 has them; of linear scaling those by which every wave is stretched. Any other is refused."""
    key = "rope_parameters" if isinstance(config.get("rope_parameters"), dict) else "rope_scaling"
    scaling = config.get(key) or {}
    if not isinstance(scaling, dict):
        raise unsupported(key, scaling)
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported(f"{key}.partial_rotary_factor", scaling["partial_rotary_factor"])
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return [float(value_of(scaling, "factor", key)), 1.0, 2.0, 1.0]
    if kind != "llama3":
        raise CheckpointError(
            f"config.json has {key} of type {kind!r}, and this network's rotary positions are scaled as Llama 3's, linearly or not at all; "
            "take a model without it (a base model of the same family before its context was extended)"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return [float(value_of(scaling, name, key)) for name in names]


def _unrotated_every(config: dict[str, Any], layers: int) -> int | None:
    """n, where every n-th layer has no positions."""
    rotated = config.get("no_rope_layers")  # 1: this layer has positions
    if rotated is None:
        return int(config.get("no_rope_layer_interval") or 4)
    return _every(config, "no_rope_layers", [not turned for turned in rotated], layers)


def _every(config: dict[str, Any], key: str, marked: list[bool], layers: int) -> int | None:
    """n, where every n-th layer is marked; None where none is. Any other order of the layers is refused by its key."""
    every = next((place + 1 for place, one in enumerate(marked) if one), None)
    if marked != [every is not None and (i + 1) % every == 0 for i in range(layers)]:
        raise unsupported(key, config[key])
    return every


def only(config: dict[str, Any], key: str, default: Any, *allowed: Any) -> None:
    value = config.get(key, default)
    if value not in allowed:
        raise unsupported(key, value)


def unsupported(key: str, value: Any) -> CheckpointError:
    return CheckpointError(f"config.json has {key} = {value!r}, which this network does not compute; take a model without it")


def value_of(config: dict[str, Any], key: str, section: str = "") -> Any:
    if config.get(key) is None:
        name = f"{section}.{key}" if section else key
        raise CheckpointError(f"config.json has no {name}; take the config.json that belongs to the weights")
    return config[key]
