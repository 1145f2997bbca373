"""A block-diffusion language model (BD3-LM, Arriola et al. 2025) that was trained with bd3_scale; needs torch and transformers only.

    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    tokens = model.generate(tokenizer("Once upon", return_tensors="pt").input_ids, max_length=128)

`forward` gives logits of every row; `generate` writes text block by block. The last id is MASK; its logit is -inf, because it
is never predicted. Parameter names and layouts are those of bd3_scale: query rows [kv_head, group, d], key/value rows
[kv_head, 2, d], gate and value of a gated MLP side by side, so that its checkpoints go through here without a change.
"""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_bd3 import BD3Config

Past = Optional[tuple[Tensor, Tensor]]  # noqa: UP045 - the oldest Python that transformers runs on
SINUSOIDS = 256


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, in fp32."""

    def __init__(self, size: int, rms: bool, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.rms, self.epsilon = rms, epsilon

    def forward(self, x: Tensor) -> Tensor:
        shape, weight = self.weight.shape, self.weight.float()
        if self.rms:
            return F.rms_norm(x.float(), shape, weight, self.epsilon).to(x.dtype)
        return F.layer_norm(x.float(), shape, weight, None if self.bias is None else self.bias.float(), self.epsilon).to(x.dtype)


def norm_of(config: BD3Config) -> Norm:
    return Norm(config.hidden, config.norm == "rmsnorm", config.norm_bias, config.norm_epsilon)


def rotate(x: Tensor, positions: Tensor, config: BD3Config, local: bool) -> Tensor:
    """Rotate the second half of the head dimension against the first. x [batch, rows, heads, d], positions [rows]."""
    size, base = x.shape[-1], config.rotary_local[0] if local else config.rotary_base
    rate = base ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    if config.rotary_scaling is not None and not local:  # as Llama 3: long waves are stretched by the factor
        factor, low, high, context = config.rotary_scaling
        kept = ((context * rate / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        rate = rate * (kept + (1 - kept) / factor)
    angle = (positions.float()[:, None] * rate)[:, None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: BD3Config, index: int) -> None:
        super().__init__()
        self.config, bias = config, config.attention_bias != "none"
        every = config.unrotated_every
        self.rotated = config.positions == "rotary" and (every is None or (index + 1) % every != 0)
        self.local = config.rotary_local is not None and (index + 1) % int(config.rotary_local[1]) != 0
        self.query = nn.Linear(config.hidden, config.heads * config.head_width, bias)
        self.key_value = nn.Linear(config.hidden, 2 * config.key_value_heads * config.head_width, bias)
        self.output = nn.Linear(config.heads * config.head_width, config.hidden, config.attention_bias == "all")
        if config.query_key_norm:
            self.together = config.query_key_norm_width == "heads"
            heads, key_heads = (config.heads, config.key_value_heads) if self.together else (1, 1)
            self.query_norm = Norm(heads * config.head_width, True, False, config.norm_epsilon)
            self.key_norm = Norm(key_heads * config.head_width, True, False, config.norm_epsilon)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, past: Past) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [batch, rows, hidden], mask bool [rows, past rows + rows] -> (output, K and V of all rows so far)."""
        config = self.config
        q = self.query(x).unflatten(-1, (-1, config.head_width))
        k, v = self.key_value(x).unflatten(-1, (-1, 2, config.head_width)).unbind(-2)
        if config.query_key_norm:
            if self.together:
                q, k = self.query_norm(q.flatten(2)).view_as(q), self.key_norm(k.flatten(2)).view_as(k)
            else:
                q, k = self.query_norm(q), self.key_norm(k)
        if self.rotated:
            q, k = rotate(q, positions, config, self.local), rotate(k, positions, config, self.local)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        grouped = config.heads != config.key_value_heads
        queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)
        return self.output(out.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, config: BD3Config) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.hidden, config.mlp_hidden * (1 if self.kind == "gelu" else 2), config.mlp_bias)
        self.down = nn.Linear(config.mlp_hidden, config.hidden, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "gelu":
            return self.down(F.gelu(x, approximate="tanh"))
        gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)
        return self.down((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * value)


class NoiseCondition(nn.Module):
    """The condition of adaLN at sigma = 0: block diffusion is not conditioned on time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self) -> Tensor:
        waves = torch.cat([torch.ones(1, SINUSOIDS // 2), torch.zeros(1, SINUSOIDS // 2)], 1)  # cos 0, sin 0
        return F.silu(self.mlp(waves.to(next(self.mlp.parameters()))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or x + norm(attention(x)), or both, and so on; with adaLN each branch is shifted,
    scaled and gated."""

    def __init__(self, config: BD3Config, index: int) -> None:
        super().__init__()
        self.norms_after = config.norm_place == "after"
        self.dropout = config.dropout
        self.attention_norm = norm_of(config)
        self.attention = Attention(config, index)
        self.mlp_norm = norm_of(config)
        self.mlp = MLP(config)
        self.attention_output_norm = norm_of(config) if config.norm_place == "both" else None
        self.mlp_output_norm = norm_of(config) if config.norm_place == "both" else None
        self.modulation = nn.Linear(config.conditioning_size, 6 * config.hidden) if config.conditioning == "adaln" else None

    def forward(self, x: Tensor, condition: Any, positions: Tensor, mask: Tensor, past: Past) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        parts = [None] * 6 if self.modulation is None else self.modulation(condition).chunk(6, -1)
        y, kept = self.attention(modulate(x if self.norms_after else self.attention_norm(x), *parts[:2]), positions, mask, past)
        x = self._add(x, self._normed(self.attention_norm, self.attention_output_norm, y), parts[2])
        y = self.mlp(modulate(x if self.norms_after else self.mlp_norm(x), *parts[3:5]))
        return self._add(x, self._normed(self.mlp_norm, self.mlp_output_norm, y), parts[5]), kept

    def _normed(self, norm: nn.Module, own: Any, y: Tensor) -> Tensor:
        return own(y) if own is not None else norm(y) if self.norms_after else y

    def _add(self, x: Tensor, y: Tensor, gate: Any) -> Tensor:
        y = F.dropout(y, self.dropout, self.training)
        return x + y if gate is None else torch.addcmul(x, gate, y)


def modulate(x: Tensor, shift: Any, scale: Any) -> Tensor:
    return x if shift is None else x * (1 + scale) + shift


class Head(nn.Module):
    def __init__(self, config: BD3Config) -> None:
        super().__init__()
        self.weight = None if config.tied_head else nn.Parameter(torch.zeros(config.vocab_size, config.hidden))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None


class BD3ForMaskedLM(PreTrainedModel):
    config_class = BD3Config
    _no_split_modules = ("Block",)
    _supports_sdpa = True

    def __init__(self, config: BD3Config) -> None:
        super().__init__(config)
        adaptive = config.conditioning == "adaln"
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.hidden)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.condition = NoiseCondition(config.conditioning_size) if adaptive else None
        self.final_norm = norm_of(config)
        self.final_modulation = nn.Linear(config.conditioning_size, 2 * config.hidden) if adaptive else None
        self.head = Head(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids: Tensor, clean_ids: Any = None, labels: Any = None, attention_mask: Any = None, **unused: Any
    ) -> MaskedLMOutput:
        """Logits fp32 [batch, n, V] of `input_ids` int64 [batch, n] (with -inf at MASK).

        bd3: block a sees itself and the blocks before it as they stand in `input_ids`; with `clean_ids` [batch, n], as they
        stand there (training: input_ids noisy, clean_ids the text). mdlm: every row sees all. ar: row i predicts token i + 1.
        `labels` [batch, n], -100 where nothing is scored: `loss` is the mean negative log-likelihood, unweighted, not shifted.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask hides tokens, but this network sees whole rows; give texts of one length")
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        if clean_ids is None:
            mask = self._visible(positions, positions, noisy=self.config.clean_half != "causal")
            logits = self._run(input_ids, positions, mask, None)[0]
        else:
            if self.config.objective != "bd3":
                raise ValueError(f"clean_ids belong to block diffusion; this is a model of {self.config.objective}")
            blocks = positions // self.config.block_size
            own = blocks[:, None] == blocks
            before = blocks[:, None] > blocks
            clean = self._visible(positions, positions, noisy=self.config.clean_half != "causal")
            mask = torch.cat([torch.cat([own, before], 1), torch.cat([torch.zeros_like(own), clean], 1)])
            logits = self._run(torch.cat([input_ids, clean_ids], 1), positions.repeat(2), mask, None)[0][:, :length]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return MaskedLMOutput(loss=loss, logits=logits)

    def _visible(self, queries: Tensor, keys: Tensor, noisy: bool) -> Tensor:
        """bool [queries, keys] of positions: who sees whom in one stream. `noisy`: a block sees itself whole."""
        config = self.config
        if config.objective == "mdlm":
            return torch.ones(len(queries), len(keys), dtype=torch.bool, device=queries.device)
        if config.objective == "ar" or not noisy:
            return queries[:, None] >= keys
        return queries[:, None] // config.block_size >= keys // config.block_size

    def _run(self, tokens: Tensor, positions: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(logits of all rows, K and V of every layer with these rows behind those of `past`)."""
        x = self.embedding(tokens)
        if self.config.positions == "learned":
            x = x + self.positions(positions)
        condition = None if self.condition is None else self.condition()
        kept = []
        for layer, block in enumerate(self.blocks):
            x, each = block(x, condition, positions, mask, None if past is None else past[layer])
            kept.append(each)
        x = self.final_norm(x)
        if self.final_modulation is not None:
            x = modulate(x, *self.final_modulation(condition).chunk(2, -1))
        weight = self.embedding.weight if self.head.weight is None else self.head.weight
        logits = F.linear(x, weight, self.head.bias).float()
        return logits.index_fill(-1, torch.tensor([self.config.mask_token_id], device=logits.device), -math.inf), kept

    # -- Text ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Any = None,
        max_length: Any = None,
        *,
        batch_size: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_at_end: bool = True,
        generator: Any = None,
    ) -> Tensor:
        """Continue `input_ids` int64 [batch, n] (default: the beginning of a text) to `max_length` tokens, at most the context.

        Block by block, given the finished blocks (kept as K and V): one token of every unfinished text is revealed per call of
        the network, at a random place of the block (first-hitting sampling, exact). temperature 0: the most probable token.
        `generator`: of the model's device. Everything behind a drawn end of text is the end of text (`stop_at_end`). Returns int64
        [batch, max_length].
        """
        config, device = self.config, self.embedding.weight.device
        length = config.context if max_length is None else max_length
        if input_ids is None:
            input_ids = torch.full((batch_size, 1), config.bos_token_id)
        if not 0 < input_ids.shape[1] <= length <= config.context:
            raise ValueError(f"{input_ids.shape[1]} tokens given, {length} asked for: 0 < given <= asked for <= {config.context} must hold")
        size = 1 if config.objective == "ar" else config.context if config.objective == "mdlm" else config.block_size
        width, given = -(-length // size) * size, input_ids.shape[1]
        tokens = torch.full((len(input_ids), width), config.mask_token_id, device=device)
        tokens[:, :given] = input_ids.to(device)
        choose = _Choice(temperature, top_p, generator)
        # Of the next-token loss the last known token has yet to be read: its row predicts the first unknown one.
        start, past, shifted = 0, None, config.objective == "ar"
        known = given - 1 if shifted else given // size * size
        if known:
            past = self._read(tokens, 0, known, None)
            start = known
        while start < (length - 1 if shifted else length):
            stop = start + size
            if shifted:
                logits, past = self._run(tokens[:, start:stop], *self._rows(start, stop, noisy=True), past)
                tokens[:, start + 1] = choose(logits[:, 0])
            else:
                self._denoise(tokens, start, stop, past, choose)
                if stop < length:
                    past = self._read(tokens, start, stop, past)
            start = stop
            ended = self._ended(tokens[:, : start + shifted], given) if stop_at_end else None
            if ended is not None and bool(ended.any(1).all()):
                break
        tokens = tokens[:, :length]
        if stop_at_end:
            tokens = tokens.masked_fill(self._ended(tokens, given), config.eos_token_id)
        return tokens

    def _denoise(self, tokens: Tensor, start: int, stop: int, past: Any, choose: Any) -> None:
        """Fill in the masked tokens of [start, stop), in place."""
        block = tokens[:, start:stop]
        rows = torch.arange(len(tokens), device=tokens.device)
        masked = block == self.config.mask_token_id
        order = choose.uniform(masked.shape, tokens.device)
        while bool(masked.any()):
            logits, _ = self._run(block, *self._rows(start, stop, noisy=True), past)
            place = order.masked_fill(~masked, 2.0).argmin(1)
            due = masked[rows, place]
            block[rows[due], place[due]] = choose(logits[rows, place])[due]
            masked[rows, place] = False

    def _read(self, tokens: Tensor, start: int, stop: int, past: Any) -> Any:
        """K and V with the finished tokens [start, stop)."""
        return self._run(tokens[:, start:stop], *self._rows(start, stop, noisy=self.config.clean_half != "causal"), past)[1]

    def _rows(self, start: int, stop: int, noisy: bool) -> tuple[Tensor, Tensor]:
        """(positions of the rows, what they see)."""
        device = self.embedding.weight.device
        positions = torch.arange(start, stop, device=device)
        return positions, self._visible(positions, torch.arange(stop, device=device), noisy)

    def _ended(self, tokens: Tensor, given: int) -> Tensor:
        """bool [batch, n]: behind (or at) a drawn end of text."""
        drawn = tokens == self.config.eos_token_id
        drawn[:, :given] = False
        return drawn.cumsum(1) > 0


class _Choice:
    """Tokens from logits [batch, V]."""

    def __init__(self, temperature: float, top_p: float, generator: Any) -> None:
        self.temperature, self.top_p, self.generator = temperature, top_p, generator

    def uniform(self, shape: Any, device: Any) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(-1, ids, outside), 0.0)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
