"""The `model` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ModelConfig:
    """Shape of the network. Nothing here depends on how many ranks hold it."""

    context: int = 1024
    """L, data tokens per row."""
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    key_value_heads: int | None = None
    """Grouped-query attention when fewer than heads; default: heads."""
    head_width: int | None = None
    """Width of one head; default: hidden / heads."""
    positions: str = "rotary"
    """rotary | learned (a vector per position, added to the embedding: no text can be longer than `context`)."""
    attention_bias: str = "none"
    """Biases of the attention's linears: none | query_key_value | all (the output, too)."""
    query_key_norm: bool = False
    """RMSNorm over the width of every head of query and key, before they are rotated."""
    norm: str = "layernorm"
    """layernorm | rmsnorm; computed in fp32."""
    norm_bias: bool = False
    """A bias beside the weight of every LayerNorm."""
    norm_epsilon: float = 1e-5
    mlp: str = "gelu"
    """gelu (tanh form) | swiglu."""
    mlp_hidden: int | None = None
    """Default: 4 x hidden for gelu, 8/3 x hidden rounded up to a multiple of 64 for swiglu."""
    mlp_bias: bool = False
    conditioning: str = "none"
    """none | adaln (the paper's DiT form)."""
    conditioning_size: int = 128
    tied_head: bool = False
    """Share the embedding with the head."""
    head_bias: bool = False
    dropout: float = 0.0
    rotary_base: float = 10000.0
    initial_std: float = 0.02
    attention: str = "auto"
    """The kernel: auto (flex on CUDA, tiled on CPU) | flex | flex_triton | flex_flash (FlexAttention by the backend named: Triton, or
    FlashAttention 4, which must be installed; tried before the run) | tiled | dense (reference: four times the work). Changes no result."""

    head_loss: str = "eager"
    """The cross-entropy of the logits: eager (megatron-core's) | fused (compiled, which moves a sixth of the memory; not yet seen on a
    GPU). Changes no result."""

    @property
    def head_size(self) -> int:
        return self.head_width or self.hidden // self.heads

    @property
    def kv_heads(self) -> int:
        return self.key_value_heads or self.heads

    @property
    def mlp_size(self) -> int:
        if self.mlp_hidden:
            return self.mlp_hidden
        return 4 * self.hidden if self.mlp == "gelu" else -(-8 * self.hidden // 3 // 64) * 64
