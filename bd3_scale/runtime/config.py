"""The `run`, `training`, `validation` and `tracking` sections of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunConfig:
    """Who this run is."""

    name: str = "bd3"
    dir: str = "runs/${run.name}"
    seed: int = 0
    resume: str = "auto"
    """auto (continue the newest checkpoint) | never (refuse if there is one) | fresh (needs an empty directory)."""
    time_limit: float | None = None
    """Seconds of wall clock, counted from the start of the process, after which the run saves its state and leaves with status 0."""
    amend: list[str] = field(default_factory=list)
    """Keys of the recipe, such as [training.learning_rate, data.skip], that may change where a run is continued. Without its name here a
    change is refused. From that step on the new value is the run's: written into checkpoints and metrics, and refused to change back."""
    device: str = "auto"
    """auto (cuda where there is one) | cpu | cuda."""
    threads: int | None = None
    """CPU threads of each process; null: OMP_NUM_THREADS where it was set by hand, else the cores shared by the processes of a host."""


@dataclass
class TrainingConfig:
    """Budget and optimizer (AdamW)."""

    steps: int | None = None
    """Optimizer steps; this or `tokens`."""
    tokens: int | None = None
    """Data tokens; rounded up to whole steps."""
    global_batch: Any = 512
    """Rows per optimizer step over all ranks and micro-batches, at least one for each data-parallel rank; or a schedule [[0, rows],
    [from sample, rows], ...]: as many from the first step on before which so many samples (rows) were consumed. What counts steps (warmup,
    schedule, decay, every, ema) goes on counting steps."""
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only."""
    warmup: int = 2500
    """Steps of linear warm-up."""
    schedule: str = "constant"
    """constant | cosine | wsd (warm-up, stable, decay), the last two to learning_rate * final_fraction at the last step."""
    final_fraction: float = 0.1
    decay: int = 0
    """wsd: the last so many steps decay, as 1 - sqrt. A decay starts from any checkpoint with training.steps = its step + decay."""
    rewarmup: int = 0
    """Steps of linear warm-up after every change of objective.block_size."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    spike_deviations: float = 0.0
    """Leave out a step whose gradient norm exceeds the mean of the last 128 by this many standard deviations (6 is usual); 0:
    only steps whose norm is not a finite number are left out."""
    skipped_in_a_row: int = 10
    """End the run when more steps than this were left out one after another."""
    ema: float = 0.9999
    """Decay of the averaged weights, ramped as min(ema, (1 + n) / (10 + n)); 0 switches them off."""
    precision: str = "auto"
    """auto (bf16 on CUDA, fp32 on CPU) | bf16 | fp32."""
    recompute: str = "none"
    """What a backward computes again instead of keeping it (activation checkpointing): none | attention (every layer's first half: norm,
    query, key, value, kernel, output) | mlp (its second half) | layer (both, from the layer's input alone)."""
    compile: str = "none"
    """torch.compile: none | blocks (each layer) | max-autotune (each layer, CUDA; its kernels chosen by timing them: minutes at the start,
    tried before the run)."""


@dataclass
class ValidationConfig:
    """NELBO on a fixed held-out set with fixed noise and the EMA weights."""

    every: int = 5000
    """Steps between validations; there is one after the last step. 0: only that one."""
    rows: int = 512
    """Held-out rows used (fewer if the set is smaller)."""


@dataclass
class TrackingConfig:
    """What is written down and where."""

    every: int = 10
    """Steps between lines of metrics.jsonl; nothing waits for the device in between."""
    wandb: str = "disabled"
    """online | offline | disabled."""
    project: str = "bd3_scale"
    entity: str | None = None
    progress: bool = True
    """A progress line on the terminal."""
    plots: bool = True
    """Draw report/*.png at validations (not so often that it slows the run) and at the end; tools/plot_run.py draws them at any time."""
    sample_tokens: int = 0
    """Tokens sampled from the last checkpoint and printed when the run ends; 0: none."""
