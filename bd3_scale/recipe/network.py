"""Every key of the network: the section `model` of a recipe, as `schema.py` has the others.

Invariant: nothing here depends on the number of ranks or on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_scale.recipe.keys import key


@dataclass
class ModelConfig:
    """Shape of the network. Nothing here depends on how many ranks hold it."""

    context: int = key(1024, above=0)
    """L, data tokens per row."""
    layers: int = key(12, above=0)
    """Transformer layers."""
    hidden: int = key(768, above=0)
    """Width of the residual stream."""
    heads: int = key(12, above=0)
    """Attention heads (of the queries)."""
    key_value_heads: int | None = key(None, above=0)
    """Grouped-query attention when fewer than heads; default: heads."""
    head_width: int | None = key(None, above=0)
    """Width of one head; default: hidden / heads."""
    positions: str = key("rotary", choices=("rotary", "learned"))
    """rotary turns queries and keys; learned adds a vector per position to the embedding: no text can be longer than `context`."""
    attention_bias: str = key("none", choices=("none", "query_key_value", "all"))
    """Biases of the attention's linears; all: of its output, too."""
    query_key_norm: bool = False
    """RMSNorm of query and key, before they are rotated."""
    query_key_norm_width: str = key("head", choices=("head", "heads"))
    """What one of these norms goes over: head, each head by itself (Qwen3); heads, all heads together (OLMo 2)."""
    norm: str = key("layernorm", choices=("layernorm", "rmsnorm"))
    """Kind of every norm; computed in fp32."""
    norm_place: str = key("before", choices=("before", "after", "both"))
    """Where attention and MLP have theirs: x + f(norm(x)); x + norm(f(x)) (OLMo 2); or both, of which each has its own (Gemma 3)."""
    norm_bias: bool = False
    """A bias beside the weight of every LayerNorm."""
    norm_epsilon: float = key(1e-5, above=0)
    """Added to the variance (mean square) in every norm."""
    mlp: str = key("gelu", choices=("gelu", "swiglu", "geglu"))
    """Activation of the MLP; gelu is the tanh form, which geglu has as its gate."""
    mlp_hidden: int | None = key(None, above=0)
    """Default: 4 x hidden for gelu, 8/3 x hidden rounded up to a multiple of 64 for gated ones."""
    mlp_bias: bool = False
    """Biases of the MLP's linears."""
    conditioning: str = key("none", choices=("none", "adaln"))
    """How the network is told the noise level; adaln is the paper's DiT form."""
    conditioning_size: int = key(128, above=0)
    """Width of the vector that carries the noise level to adaLN."""
    tied_head: bool = False
    """Share the embedding with the head."""
    head_bias: bool = False
    """A bias for every word of the vocabulary."""
    dropout: float = key(0.0, least=0)
    """Probability, below 1, of dropping an element of what attention and MLP add to the residual stream, in training."""
    rotary_base: float = key(10000.0, above=0)
    """Base of the wavelengths of rotary positions (theta)."""
    rotary_scaling: list[float] | None = None
    """Longer wavelengths of rotary positions, as Llama 3 has them: [factor, low, high, context]. Waves longer than context / low tokens are
    stretched by the factor, those shorter than context / high are not, between them part by part; Llama 3.1: [8, 1, 4, 8192]. With
    [factor, 1, 2, 1] all are (linear scaling)."""
    rotary_local: list[float] | None = None
    """[base, n]: all layers but every n-th have this base, without scaling (Gemma 3: [10000, 6]); default: all have rotary_base."""
    unrotated_every: int | None = key(None, above=0)
    """Every n-th layer has no positions (NoPE; SmolLM3: 4); default: all have."""
    initial_std: float = key(0.02, above=0)
    """Standard deviation of initial weights; of those that write into the residual stream, divided by sqrt(2 layers)."""
    attention: str = key("auto", choices=("auto", "flex", "flex_triton", "flex_flash", "tiled", "dense"), change="free")
    """The kernel. auto: flex on CUDA, tiled on CPU; flex_triton, flex_flash: FlexAttention by the backend named (Triton, or FlashAttention
    4, which must be installed), tried before the run; dense: a reference with four times the work. Changes no result."""
    head_loss: str = key("eager", choices=("eager", "fused"), change="free")
    """The cross-entropy of the logits. eager: megatron-core's; fused: compiled, which moves a sixth of the memory (on an H200 a step of
    110M parameters takes 10 % less, one of 1.3B 1 %). Changes no result."""

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
        return -(-8 * self.hidden // 3 // 64) * 64 if self.gated else 4 * self.hidden

    @property
    def gated(self) -> bool:
        """Whether every unit of the MLP has a gate beside its value."""
        return self.mlp != "gelu"

    def rotary_of(self, layer: int) -> str | None:
        """What queries and keys of a layer are turned by: base (`rotary_base`), local (`rotary_local`), or nothing."""
        if self.positions != "rotary" or (self.unrotated_every and (layer + 1) % self.unrotated_every == 0):
            return None
        return "local" if self.rotary_local and (layer + 1) % int(self.rotary_local[1]) else "base"
