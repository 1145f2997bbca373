"""The training step of one network on one device: against its naive form and an autoregressive step, each saving switched off alone,
the peak of memory as rows grow, and MFU with the attention kernels on a GPU.

Invariants: all sides of a comparison have the same weights, rows and masks; each computes the same loss (checked before anything is
timed), so that a side that is fast because it is wrong cannot be reported.
"""

from __future__ import annotations

import argparse
import statistics as statistics_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmark_measure import alternate, paired_ratio, peak_bytes, split_of_time
from megatron.core import parallel_state
from torch import Tensor

from bd3_scale.attention import kernels
from bd3_scale.attention.kernels import BACKENDS
from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.compiling import RECOMPUTED, wrap_blocks
from bd3_scale.costs import sizes
from bd3_scale.costs.flops import count_flops, peak_flops
from bd3_scale.distributed import layout
from bd3_scale.distributed.sequence_shards import Stream
from bd3_scale.engines.initialise import initialise
from bd3_scale.engines.kernel_probe import Shape, probe
from bd3_scale.errors import TrainingError
from bd3_scale.model.attention import rotary_tables
from bd3_scale.model.transformer import ForwardContext, Rows, Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs
from bd3_scale.objectives.table import BlockDiffusion, MaskedDiffusion
from bd3_scale.recipe.schema import ModelConfig, ParallelConfig

VOCABULARY = 50258
Step = Callable[[], None]


def whole_layers(model: Transformer, inputs: NetworkInputs) -> Tensor:
    """Hidden states [rows, batch, hidden] of all rows: every layer, the last one too, on both halves."""
    x = model.embedding(inputs.tokens)
    stream = Stream(inputs.pattern)
    rotary = rotary_tables(inputs.positions, model.config, model.layers)
    every = Rows(stream.rows)
    shared = ForwardContext(rotary, stream, None, every, every, model.kernel, segments=inputs.segments)
    for block in model.blocks.values():
        x = block(x, shared, False, None)
    return model.final_norm(x)


def naive_loss(model: Transformer, inputs: NetworkInputs) -> Tensor:
    """The objective as a plain implementation computes it, on the same weights."""
    pattern = inputs.pattern
    logits = F.linear(whole_layers(model, inputs), model.head.weight).float()
    logits[..., model.head.impossible :] = float("-inf")
    log_p = logits.log_softmax(-1)[: pattern.scored_rows].transpose(0, 1).flatten(0, 1)
    return -(log_p[inputs.selected].gather(1, inputs.targets[:, None])[:, 0] * inputs.weights).sum()


def autoregressive_inputs(inputs: NetworkInputs, rows: np.ndarray) -> NetworkInputs:
    """The same rows for next-token prediction: causal, L tokens, a loss on L - 1 of them."""
    tokens = torch.from_numpy(rows)
    batch, length = tokens.shape
    selected = (torch.arange(batch)[:, None] * length + torch.arange(length - 1)).flatten()
    return replace(
        inputs,
        tokens=tokens,
        positions=torch.arange(length),
        selected=selected,
        targets=tokens[:, 1:].flatten(),
        weights=torch.ones(len(selected)),
        pattern=AttentionPattern("causal", length, 1),
        sparse=False,
    )


@dataclass
class Bench:
    """A network with its optimizer, and one micro-batch for block diffusion and for the next-token loss."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    inputs: NetworkInputs
    whole: NetworkInputs
    """The same with the clean rows that nobody sees, for the naive form."""
    causal: NetworkInputs
    rows: np.ndarray
    device: torch.device

    def side(self, total: Callable[[], Tensor], kernel: str = "auto", optimizer: torch.optim.Optimizer | None = None) -> Step:
        """A training step on the sum of weighted nll that `total` gives."""
        chosen = optimizer or self.optimizer

        def step() -> None:
            self.use(kernel)
            (total() / self.rows.size).backward()
            chosen.step()
            chosen.zero_grad(set_to_none=False)

        return step

    def shape(self) -> Shape:
        """What a probe of the compiler is told."""
        config = self.model.config
        precision = "bf16" if next(self.model.parameters()).dtype == torch.bfloat16 else "fp32"
        return Shape(self.inputs.pattern, config.heads // config.kv_heads, config.head_size, precision, documents=False)

    def use(self, kernel: str) -> None:
        self.model.kernel = kernel

    def ours(self) -> Tensor:
        return self.model(self.inputs)[0]

    def autoregressive(self) -> Tensor:
        return self.model(self.causal)[0]

    def same(self, sides: dict[str, tuple[Callable[[], Tensor], str]], tolerance: float) -> None:
        """Every side is the same function, or nothing is timed."""
        with torch.no_grad():
            self.use("auto")
            expected = float(self.ours())
            for name, (total, kernel) in sides.items():
                self.use(kernel)
                found = float(total())
                assert abs(found / expected - 1) < tolerance, f"{name} computes {found}, not {expected}"


def bench(options: argparse.Namespace, context: int | None = None) -> Bench:
    device, context = torch.device(options.device), context or options.context
    if not parallel_state.model_parallel_is_initialized():
        layout.start(ParallelConfig(), options.device)
    config = ModelConfig(context=context, layers=options.layers, hidden=options.hidden, heads=options.heads)
    model = Transformer(config, VOCABULARY, VOCABULARY - 1)
    initialise(model, config, seed=0)
    model.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows = np.random.default_rng(0).integers(0, VOCABULARY - 1, (options.micro_batch, context))
    inputs, whole = (
        BlockDiffusion(VOCABULARY - 1, context, options.block_size, row_multiple=multiple)
        .training_inputs(rows, np.arange(len(rows)), 0, 0, len(rows))
        .to(device)
        for multiple in (1, 2 * context)
    )
    causal = autoregressive_inputs(inputs, rows).to(device)
    return Bench(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), inputs, whole, causal, rows, device)


def tolerance(device: torch.device) -> float:
    return 1e-4 if device.type == "cpu" else 2e-2


def benchmark_step(options: argparse.Namespace) -> dict[str, Any]:
    """Ours, the naive form, an autoregressive step: time, peak of memory, where the time goes."""
    made = bench(options)

    def naive() -> Tensor:
        return naive_loss(made.model, made.whole)

    made.same({"naive": (naive, "dense")}, tolerance(made.device))
    sides = {"block diffusion": made.side(made.ours), "naive": made.side(naive, "dense"), "autoregressive": made.side(made.autoregressive)}
    seconds = alternate(sides, options.rounds, made.device)
    peaks = {name: peak_bytes(step, made.device) for name, step in sides.items()}
    ratio = {name: paired_ratio(seconds["block diffusion"], seconds[name]) for name in ("naive", "autoregressive")}
    median = {name: statistics_module.median(values) for name, values in seconds.items()}
    return {
        "masked_positions": len(made.inputs.selected),
        "median_seconds": median,
        "seconds": seconds,
        "peak_bytes_above_state": peaks,
        "naive_over_block_diffusion_time": 1 / ratio["naive"],
        "block_diffusion_over_naive_peak": peaks["block diffusion"] / peaks["naive"],
        "block_diffusion_over_autoregressive_time": ratio["autoregressive"],
        "the_same_in_exact_flops": flops(made, made.inputs) / flops(made, made.causal),
        "data_tokens_per_second": made.rows.size / median["block diffusion"],
        **speed(made, median["block diffusion"]),
        "share_of_time": split_of_time(sides["block diffusion"], VOCABULARY, made.device),
    }


def benchmark_one_block(options: argparse.Namespace) -> dict[str, Any]:
    """A step of block diffusion at L' = L, most of the paper's schedule: against masked diffusion and an autoregressive step."""
    options.block_size = options.context
    made = bench(options)
    masked = MaskedDiffusion(VOCABULARY - 1, options.context)
    twin = masked.training_inputs(made.rows, np.arange(len(made.rows)), 0, 0, len(made.rows)).to(made.device)

    def mdlm() -> Tensor:
        return made.model(twin)[0]

    made.same({"masked diffusion": (mdlm, "auto")}, 1e-12)
    sides = {"block diffusion": made.side(made.ours), "masked diffusion": made.side(mdlm), "autoregressive": made.side(made.autoregressive)}
    seconds = alternate(sides, options.rounds, made.device)
    return {
        "masked_positions": len(made.inputs.selected),
        "median_seconds": {name: statistics_module.median(values) for name, values in seconds.items()},
        "seconds": seconds,
        "block_diffusion_over_masked_diffusion_time": paired_ratio(seconds["block diffusion"], seconds["masked diffusion"]),
        "block_diffusion_over_autoregressive_time": paired_ratio(seconds["block diffusion"], seconds["autoregressive"]),
        "the_same_in_exact_flops": flops(made, made.inputs) / flops(made, made.causal),
    }


DRAWS = (1, 2, 4)


def benchmark_draws(options: argparse.Namespace) -> dict[str, Any]:
    """A step on as many noisy rows, of which 1, 2 or 4 share a clean half: the very same rows and masks, so the very same loss."""
    made, most = bench(options), max(DRAWS)
    rows = made.rows[: options.micro_batch // most]

    def inputs_of(draws: int) -> NetworkInputs:
        each = np.repeat(rows, most // draws, axis=0)
        objective = BlockDiffusion(VOCABULARY - 1, options.context, options.block_size, draws=draws)
        return objective.training_inputs(each, np.arange(len(each)), 0, 0, len(each)).to(made.device)

    inputs = {f"{draws} draws": inputs_of(draws) for draws in DRAWS}
    made.inputs = inputs["1 draws"]
    totals = {name: partial(lambda one: made.model(one)[0], one) for name, one in inputs.items()}
    made.same({name: (total, "auto") for name, total in totals.items()}, tolerance(made.device))
    sides = {name: made.side(total) for name, total in totals.items()}
    seconds = alternate(sides, options.rounds, made.device)
    peaks = {name: peak_bytes(step, made.device) for name, step in sides.items()}
    return {
        "masked_positions": len(made.inputs.selected),
        "median_seconds": {name: statistics_module.median(values) for name, values in seconds.items()},
        "seconds": seconds,
        "time_over_1_draw": {name: paired_ratio(values, seconds["1 draws"]) for name, values in seconds.items()},
        "the_same_in_exact_flops": {name: flops(made, one) / flops(made, made.inputs) for name, one in inputs.items()},
        "peak_over_1_draw": {name: peak / peaks["1 draws"] for name, peak in peaks.items()},
    }


def flops(made: Bench, inputs: NetworkInputs) -> float:
    """FLOPs of a training step on these inputs, all streams counted, exactly the selected positions."""
    rows, pattern = len(inputs.tokens), inputs.pattern
    selected = int((inputs.weights > 0).sum()) / (rows * pattern.draws * (pattern.length - 1))
    return rows * count_flops(made.model.config, pattern, VOCABULARY, selected).model


def speed(made: Bench, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"model_flops_per_second": flops(made, made.inputs) / seconds}
    if made.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(), "bf16")
        found["mfu"] = None if peak is None else found["model_flops_per_second"] / peak
    return found


def benchmark_features(options: argparse.Namespace) -> dict[str, Any]:
    """Each saving switched off alone: time and peak relative to all of them on."""
    made = bench(options)
    model, inputs, pattern = made.model, made.inputs, made.inputs.pattern
    scored = torch.arange(made.rows.size, device=made.device)
    weights = torch.zeros(made.rows.size, device=made.device)
    real = inputs.weights > 0
    weights[inputs.selected[real]] = inputs.weights[real]
    targets = torch.from_numpy(made.rows.ravel()).to(made.device)
    everywhere = replace(inputs, selected=scored, targets=targets, weights=weights)

    def both_halves() -> Tensor:
        states = whole_layers(model, inputs)[: pattern.scored_rows].transpose(0, 1).flatten(0, 1)
        return model.head(states[inputs.selected], inputs.targets, inputs.weights)[0]

    def logits_at_once() -> Tensor:
        with at_once():
            return made.ours()

    def recomputed(part: str) -> Tensor:
        wrap_blocks(model.blocks.values(), recompute=part, compile="none")
        try:
            return made.ours()
        finally:
            bare(model)

    off: dict[str, tuple[Callable[[], Tensor], str]] = {
        "attention by the dense 2L x 2L mask": (made.ours, "dense"),
        "last layer on both halves": (both_halves, "auto"),
        "last layer on all noisy rows": (lambda: model(replace(inputs, sparse=False))[0], "auto"),
        "logits of all L noisy positions": (lambda: model(everywhere)[0], "auto"),
        "logits not in chunks": (logits_at_once, "auto"),
        **{f"with recomputation of {part}": (partial(recomputed, part), "auto") for part in RECOMPUTED},
    }
    made.same(off, tolerance(made.device))
    slow = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
    sides = {"all on": made.side(made.ours), **{name: made.side(total, kernel) for name, (total, kernel) in off.items()}}
    sides["AdamW not fused"] = made.side(made.ours, "auto", slow)
    seconds = alternate(sides, options.rounds, made.device)
    peaks = {name: peak_bytes(step, made.device) for name, step in sides.items()}
    return {
        "median_seconds": {name: statistics_module.median(values) for name, values in seconds.items()},
        "seconds": seconds,
        **{f"{name}: time": paired_ratio(seconds[name], seconds["all on"]) for name in sides if name != "all on"},
        **{f"{name}: peak memory": peaks[name] / peaks["all on"] for name in sides if name != "all on"},
    }


@contextmanager
def at_once() -> Iterator[None]:
    """The head's logits in one chunk."""
    before = dict(sizes.LOGITS_CHUNK)
    sizes.LOGITS_CHUNK.update(dict.fromkeys(before, 1 << 62))
    try:
        yield
    finally:
        sizes.LOGITS_CHUNK.update(before)


def benchmark_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak of a step above its state, against L: a line, where nothing of size L^2 is kept."""
    lengths, peaks = options.contexts, []
    for context in lengths:
        made = bench(options, context)
        step = made.side(made.ours)
        step()
        peaks.append(peak_bytes(step, made.device))
        print(f"L = {context}: {peaks[-1] / 2**20:.0f} MiB", flush=True)
        del made, step
    x, y = np.array(lengths, float), np.array(peaks, float)
    line, curve = np.polyfit(x, y, 1), np.polyfit(x, y, 2)
    return {
        "peak_bytes": dict(zip(map(str, lengths), peaks, strict=True)),
        "bytes_per_token": float(line[0]),
        "bytes_at_zero": float(line[1]),
        "largest_deviation_from_the_line": float(np.abs(np.polyval(line, x) / y - 1).max()),
        "quadratic_share_at_the_longest": float(curve[0] * x[-1] ** 2 / y[-1]),
    }


def benchmark_device(options: argparse.Namespace) -> dict[str, Any]:
    """What a GPU makes of it: MFU, the ratio to next-token prediction, each backend of Flex against causal flash, each compilation of the
    layers, parity with the CPU's form."""
    result: dict[str, Any] = {}
    for context in options.contexts:
        made = bench(options, context)
        cuda = made.device.type == "cuda"
        chosen = options.compile or ("blocks" if cuda else "none")
        wrap_blocks(made.model.blocks.values(), recompute=options.recompute, compile=chosen)
        sides = {"block diffusion": made.side(made.ours), "autoregressive": made.side(made.autoregressive)}
        seconds = alternate(sides, options.rounds, made.device)
        median = statistics_module.median(seconds["block diffusion"])
        result[f"L = {context}"] = {
            "seconds": median,
            "data_tokens_per_second": made.rows.size / median,
            "peak_bytes_above_state": peak_bytes(sides["block diffusion"], made.device),
            "share_of_time": split_of_time(sides["block diffusion"], VOCABULARY, made.device),
            "block_diffusion_over_autoregressive_time": paired_ratio(seconds["block diffusion"], seconds["autoregressive"]),
            "the_same_in_exact_flops": flops(made, made.inputs) / flops(made, made.causal),
            **speed(made, median),
            "attention_flops_per_second_over_causal_flash": {
                kernel: attention_ratio(made, options.rounds, kernel) for kernel in (BACKENDS if cuda else ["auto"])
            },
            "compile": chosen,
            "seconds_by_compile": by_compile(made, options.compared or [chosen], options.recompute, options.rounds),
        }
        del made, sides
    result["parity_with_cpu"] = parity(options)
    return result


def bare(model: Transformer) -> None:
    """Undo `wrap_blocks`: every layer has its class's methods again."""
    for block in model.blocks.values():
        for method in RECOMPUTED.values():
            block.__dict__.pop(method, None)


def by_compile(made: Bench, choices: list[str], recompute: str, rounds: int) -> dict[str, float | str]:
    """Median seconds of a step under each choice of `training.compile`, in turns; or why it does not work here."""

    def side(choice: str) -> Step:
        def total() -> Tensor:
            bare(made.model)
            wrap_blocks(made.model.blocks.values(), recompute=recompute, compile=choice)
            return made.ours()

        return made.side(total)

    failed: dict[str, float | str] = {}
    sides = {}
    try:
        for choice in choices:
            try:
                if choice == "max-autotune":
                    probe(made.shape(), made.device, compile=choice)
                side(choice)()
                sides[choice] = side(choice)
            except Exception as error:  # whatever a compiler raises, the other choices are still measured
                failed[choice] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return failed | {name: statistics_module.median(seconds) for name, seconds in alternate(sides, rounds, made.device).items()}
    finally:
        bare(made.model)


def attention_ratio(made: Bench, rounds: int, kernel: str) -> float | str:
    """FLOP/s of block-diffusion attention, forward and backward, over those of causal flash on 2L rows (near equal FLOPs); or why the
    kernel does not work here."""
    try:
        if BACKENDS.get(kernel) is not None:
            probe(made.shape(), made.device, kernel=kernel)
    except TrainingError as error:
        return str(error)
    pattern, config = made.inputs.pattern, made.model.config
    causal = AttentionPattern("causal", pattern.rows, 1)
    dtype = next(made.model.parameters()).dtype
    shape = (pattern.rows, len(made.rows), config.heads, config.head_size)
    q, k, v = (torch.randn(shape, device=made.device, dtype=dtype, requires_grad=True) for _ in range(3))

    def side(what: AttentionPattern, chosen: str) -> Step:
        return lambda: kernels.attend(q, k, v, what, chosen).sum().backward()

    seconds = alternate({"ours": side(pattern, kernel), "causal": side(causal, "auto")}, rounds, made.device)
    return paired_ratio(seconds["causal"], seconds["ours"]) * pattern.visible_pairs / causal.visible_pairs


def parity(options: argparse.Namespace) -> dict[str, float]:
    """Largest relative difference of loss and gradients between this device's kernels (its precision) and the CPU's in fp32."""
    small = argparse.Namespace(**{**vars(options), "layers": 2, "hidden": 256, "heads": 4, "micro_batch": 2})
    here, there = bench(small, 512), bench(argparse.Namespace(**{**vars(small), "device": "cpu"}), 512)
    losses = []
    for made in (here, there):
        total = made.ours()
        total.backward()
        losses.append(float(total))
    differences = [
        float((a.grad.float().cpu() - b.grad).norm() / b.grad.norm())
        for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    ]
    return {"loss": abs(losses[0] / losses[1] - 1), "gradients": max(differences)}
