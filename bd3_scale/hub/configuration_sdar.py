"""Configuration of a block-diffusion language model in the shape of Qwen3, for servers that know `SDARForCausalLM`."""

from typing import Any

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    """Every key stands in config.json, under the names of Qwen3's; `block_size` is what the model was trained with."""

    model_type = "sdar"

    def __init__(self, **values: Any) -> None:
        for name in list(values):
            if name in NAMES:
                setattr(self, name, values.pop(name))
        super().__init__(**values)


NAMES = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "sliding_window",
    "vocab_size",
    "mask_token_id",
    "block_size",
}
