"""Configuration of a block-diffusion language model that was trained with bd3_scale; every key stands in config.json."""

from typing import Any

from transformers import PretrainedConfig


class BD3Config(PretrainedConfig):
    """Shape of the network, and what sampling needs: `objective` (bd3 | mdlm | ar), `block_size`, `mask_token_id` (the last id)."""

    model_type = "bd3_scale"

    def __init__(
        self,
        context: int = 1024,
        layers: int = 12,
        hidden: int = 768,
        heads: int = 12,
        key_value_heads: int = 12,
        head_width: int = 64,
        positions: str = "rotary",
        attention_bias: str = "none",
        query_key_norm: bool = False,
        query_key_norm_width: str = "head",
        norm: str = "layernorm",
        norm_place: str = "before",
        norm_bias: bool = False,
        norm_epsilon: float = 1e-5,
        mlp: str = "gelu",
        mlp_hidden: int = 3072,
        mlp_bias: bool = False,
        conditioning: str = "none",
        conditioning_size: int = 128,
        tied_head: bool = False,
        head_bias: bool = False,
        dropout: float = 0.0,
        rotary_base: float = 10000.0,
        rotary_scaling: Any = None,
        rotary_local: Any = None,
        unrotated_every: Any = None,
        vocab_size: int = 50258,
        mask_token_id: int = 50257,
        objective: str = "bd3",
        block_size: int = 4,
        clean_half: str = "block_causal",
        **others: Any,
    ) -> None:
        self.context, self.layers, self.hidden, self.heads = context, layers, hidden, heads
        self.key_value_heads, self.head_width, self.positions = key_value_heads, head_width, positions
        self.attention_bias, self.query_key_norm, self.query_key_norm_width = attention_bias, query_key_norm, query_key_norm_width
        self.norm, self.norm_place = norm, norm_place
        self.norm_bias, self.norm_epsilon = norm_bias, norm_epsilon
        self.mlp, self.mlp_hidden, self.mlp_bias = mlp, mlp_hidden, mlp_bias
        self.conditioning, self.conditioning_size = conditioning, conditioning_size
        self.tied_head, self.head_bias, self.dropout, self.rotary_base = tied_head, head_bias, dropout, rotary_base
        self.rotary_scaling, self.rotary_local, self.unrotated_every = rotary_scaling, rotary_local, unrotated_every
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.objective, self.block_size, self.clean_half = objective, block_size, clean_half
        super().__init__(**others)
