"""Every key of a recipe, all sections but the network's (`network.py`): type, default, what it may be, whether a continued run may change
it, meaning.

A key's facts stand in `key(...)`, in the words of `keys.Facts`; its meaning is the text below it. `python -m bd3_scale.recipe` prints
both and makes docs/recipe.md. Invariants: nothing here depends on the number of ranks or on a device; a section is plain data that
omegaconf reads and writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bd3_scale.batches import Shares
from bd3_scale.recipe.keys import key
from bd3_scale.recipe.network import ModelConfig as ModelConfig
from bd3_scale.recipe.objective_kinds import Kind, block_size_shares, block_sizes, kind_named
from bd3_scale.recipe.optimizers import OPTIMIZERS, States


@dataclass
class RunConfig:
    """Who this run is."""

    name: str = key("bd3", change="free")
    """Name of the run, in its default folder and in wandb."""
    dir: str = key("runs/${run.name}", change="free")
    """Folder of everything that the run writes. A run that is there already is continued, see `resume`."""
    seed: int = key(0, least=0, change="amend")
    """Initial weights, noise, dropout and the order of the rows are functions of it."""
    resume: str = key("auto", choices=("auto", "never", "fresh"), change="free")
    """auto continues the newest checkpoint, never refuses if there is one, fresh needs an empty directory."""
    time_limit: float | None = key(None, above=0, change="free")
    """Seconds of wall clock, counted from the start of the process, after which the run saves its state and leaves with status 0."""
    amend: list[str] = key([], change="free")
    """Keys of the recipe, such as [training.learning_rate, data.skip], that may change where a run is continued. Without its name here a
    change is refused. From that step on the new value is the run's: written into checkpoints and metrics, and whoever continues it must
    have it, too. As long as a key is named, it may change again, also back."""
    device: str = key("auto", choices=("auto", "cpu", "cuda"), change="free")
    """auto: cuda where there is one."""
    threads: int | None = key(None, above=0, change="free")
    """CPU threads of each process; null: OMP_NUM_THREADS where it was set by hand, else the cores shared by the processes of a host."""


@dataclass
class ObjectiveConfig:
    """What is trained. Source: Arriola et al. 2025 (arXiv 2503.09573), sections 3 and 4.

    A key that its kind does not use must be left out: a value that would do nothing is a RecipeError.
    """

    kind: str = "bd3"
    """bd3 (block diffusion) | mdlm (masked diffusion: one block, one stream) | sedd (as mdlm, by score entropy, with a network
    that is told the noise: needs model.conditioning=adaln) | ssdlm (SSD-LM, Han et al. 2022: blocks as bd3, Gaussian diffusion on
    the simplex of the words, told the time: needs adaln, too; it has no likelihood) | ar (the next-token loss)."""
    block_size: Any = None
    """L', tokens per block; divides model.context. Default 4. For bd3 and ssdlm (25 in its paper, which asks for a context such as
    1000; of 1024, 16 and 32 are near). Or its schedule over training: a list of [from step, block size], such as [[0, 1024],
    [850000, 16]]; the first starts at step 0. A continued run may change the stages of steps to come. Or a mixture, {L': share}, such as
    {4: 0.5, 16: 0.3, 1024: 0.2}: every update has one of these, drawn from (seed, step), and validation says the NELBO of each."""
    interval: tuple[float, float] = key((1e-3, 1.0), change="amend")
    """[beta, omega]: training draws t from it. Validation always uses U[1e-3, 1]. Not for ar."""
    density: str = key(
        "uniform",
        choices=("uniform", "beta", "pareto"),
        change="amend",
        refused={"learned": "a density is learned by the tuner, from this one on; set tuner.enabled=true tuner.kind=density"},
    )
    """How often training draws each t of `interval`; losses are corrected by 1 / density, so that their mean stays the bound over the
    interval and only their variance changes. A tenth is always uniform. beta: a bell over the interval; pareto: t^-(1 + alpha).
    tuner.kind has the learned one. Not for ar and ssdlm, nor with `resample`."""
    density_shape: list[float] | None = key(None, change="amend")
    """Of beta [a, b], both above 0; null: [2, 2]. Of pareto [alpha], above -1, which would be uniform; null: [-0.5]."""
    clean_half: str = key("block_causal", choices=("block_causal", "causal"))
    """How clean tokens see each other: whole blocks, or causally inside a block, too. For bd3 and ssdlm."""
    noise_schedule: str = key("linear", was="schedule")
    """Mask probability over time t: linear | cosine | square | sqrt | log. `interval` bounds t. The reported NELBO is always
    linear. Not for ar, nor for ssdlm, whose Gaussian noise has a cosine schedule of its own."""
    resample: bool = key(False, change="amend")
    """Keep the *realised* masked fraction of a block, not only its t, inside `interval`. Training only. With omega < 1 the
    fully masked block is then never trained, although every block starts sampling in that state; and the expected train
    loss is no longer the bound over the interval. Not for ar and ssdlm, not for L' = 1."""
    draws: int = key(1, above=0)
    """k noisy draws of every row of data, which share its clean half: [x_t^1 ; ... ; x_t^k ; x_0], so that a scored row costs (k + 1) / k
    rows of the network instead of 2. training.global_batch counts noisy rows and must be a multiple of k; a data token is counted
    once whatever k is (tokens, budgets, tokens per second). Training only. For bd3 and ssdlm."""
    pairs: str = key("independent", choices=("independent", "complement", "antithetic"))
    """How draws 2j and 2j + 1 of a row belong together (objectives/draws.py); all but independent need even `draws`. antithetic: the
    second is made of the mirrored random numbers of the first. complement: it masks what the first leaves, at 1 - t, for every t whose
    1 - t lies in `interval`, too; needs noise_schedule=linear and a uniform density. Each draw is distributed as ever. For bd3."""

    @property
    def traits(self) -> Kind:
        """What sets its kind apart. Raises RecipeError for an unknown kind."""
        return kind_named(self.kind)

    def stages(self, context: int) -> tuple[tuple[int, int], ...]:
        """((0, L'), (from step, L'), ...), steps ascending, for rows of `context` tokens. Raises RecipeError as `block_sizes`."""
        if self.traits.in_blocks:
            return block_sizes(self.block_size)
        return ((0, context if self.traits.denoises_whole_rows else 1),)

    def shares(self, context: int) -> dict[int, float]:
        """{L': share of the updates} of a mixture of block sizes, the largest share first; otherwise {the last stage's L': 1}."""
        return block_size_shares(self.block_size) if self.traits.in_blocks else {self.stages(context)[0][1]: 1.0}

    def sizes(self, context: int) -> set[int]:
        """All block sizes that training has."""
        return {size for _, size in self.stages(context)} | set(self.shares(context))


@dataclass
class TunerConfig:
    """The search for [beta, omega] and for the density of t during training, by the variance that validation sees."""

    enabled: bool = key(False, change="amend")
    """Off: objective.interval and density are never changed. On: they are where the search starts."""
    kind: str = key("interval", choices=("interval", "density", "both"), change="amend")
    """What is searched. interval: that of least variance; objective.interval must be one of the candidates. density: the one of least
    variance on objective.interval, which leaves the train loss an estimate of the bound over it. both: a density in the best interval."""
    every: int = key(5000, change="amend")
    """Steps between tunings; each takes a validation pass on the averaged weights."""
    start_step: int = key(5000, change="amend")
    """No tuning before this step: clipping lowers the variance but can raise the perplexity of young models."""
    margin: float = key(0.02, change="amend")
    """Interval and density change only where the variance falls by more than this fraction."""
    rows: int | None = key(None, change="amend")
    """The first so many held-out rows are used; default: all that validation uses."""


@dataclass
class SourceConfig:
    """One data set of a mixture: path, remote and format as in `data`."""

    path: str = ""
    """Folder of prepared rows, as data.path."""
    weight: float = 1.0
    """Its share of the samples, with at most four decimals; the weights of a mixture sum up to 1."""
    remote: str | None = None
    """Where shards are fetched from, as data.remote."""
    format: str = "mds"
    """mds | webdataset, as data.format."""


@dataclass
class DataConfig:
    """Where rows of tokens come from. A data folder holds `manifest.json`, `train/` and `validation/`."""

    path: str = key("~/.cache/bd3_scale/data", change="free")
    """Folder of prepared rows; with `remote` set, the local cache of it."""
    remote: str | None = key(None, change="free")
    """A folder or URL (s3://, gs://, ...) that shards are fetched from when `path` lacks them."""
    format: str = key("mds", choices=("mds", "webdataset"), change="free")
    """mds: mosaicml-streaming; webdataset: tar."""
    mixture: list[SourceConfig] = key([])
    """Several data sets instead of `path`: [{path: A, weight: 0.7}, {path: B, weight: 0.3, remote: ..., format: ...}]. Each is read in
    its own order, epoch by epoch; validation takes held-out rows of all in the same proportions. A continued run may have them
    elsewhere, with the same weights."""
    cache_bytes: int | None = key(None, above=0, change="free")
    """The most that each local folder of a remote may hold: shards not needed soon are deleted from it. null: everything stays."""
    download_ahead: int = key(16, least=0, change="free")
    """Shards fetched from a remote, and opened and checked, ahead of need, after those of the current window."""
    source: str | None = key(None, choices=(None, "documentation"), change="free")
    """What to prepare `path` from when it holds no manifest. documentation: docstrings of the installed Python packages."""
    source_tokens: int = key(4_000_000, above=0)
    """At most so many tokens are prepared from `source`."""
    tokenizer: str = key("gpt2", change="free")
    """gpt2 | bytes | the path of a `tokenizers` JSON file. A continued run may have it elsewhere, but no other one."""
    row_special: str = key("bos", choices=("none", "bos", "bos_eos"))
    """Special tokens of each row when it is packed. The paper packs OpenWebText with none, so that texts go on past a row, and LM1B with
    bos_eos, where a row, and so every text of the model, ends with an end of text."""
    window: int = key(16, above=0)
    """Shards that are shuffled together: larger mixes better, smaller streams better."""
    group_by_shard: bool = False
    """The rows of each batch stand in the order of their shards, so that every replica reads (fetches, hashes) a few shards of a window and
    not all; the batches have the same rows, with other noise. For many replicas, with a window of at least as many shards as hosts."""
    document_mask: bool = False
    """Documents that are packed into one row do not see each other; in a block where one ends, from the next block on."""
    skip: list[Any] = key([], change="amend")
    """Ranges of samples, [[from, to], ...], that are left out: sample n is row n % training.global_batch of step n // training.global_batch
    of the run without a skip (with a schedule of batches, the n-th row of its steps), `to` is not left out."""
    prefetch: int = key(2, least=0, change="free")
    """Global batches read, noised and laid out ahead of need; 0: when they are needed, by the main thread."""


@dataclass
class TrainingConfig:
    """Budget and optimizer."""

    steps: int | None = key(None, above=0, change="free", example=1000)
    """Optimizer steps; this or `tokens`."""
    tokens: int | None = key(None, above=0, change="free", example=1000)
    """Data tokens; rounded up to whole steps."""
    global_batch: Any = 512
    """Rows per optimizer step over all ranks and micro-batches, at least one for each data-parallel rank; or a schedule [[0, rows],
    [from sample, rows], ...]: as many from the first step on before which so many samples (rows) were consumed. What counts steps (warmup,
    schedule, decay, every, ema) goes on counting steps. With objective.draws = k these are noisy rows, of a k-th as many rows of data;
    samples are rows of data."""
    optimizer: str = key("adamw", choices=tuple(OPTIMIZERS))
    """muon: momentum made orthogonal for the linears inside of the layers (optimizers/muon.py), AdamW for everything else. Both use the
    same learning rate and weight decay."""
    momentum: float = key(0.95, change="amend")
    """Muon's, in [0, 1)."""
    learning_rate: float = key(3e-4, above=0, change="amend")
    """Peak learning rate, reached after `warmup`."""
    betas: tuple[float, float] = key((0.9, 0.999), change="amend")
    """AdamW's decay rates of the first and second moment, each in [0, 1)."""
    epsilon: float = key(1e-8, above=0)
    """AdamW's epsilon, added to the root of the second moment."""
    weight_decay: float = key(0.0, least=0, change="amend")
    """Applied to matrices only."""
    warmup: int = key(2500, least=0, change="amend")
    """Steps of linear warm-up."""
    learning_rate_schedule: str = key("constant", was="schedule", choices=("constant", "cosine", "wsd"), change="amend")
    """Learning rate after the warm-up; wsd: stable, then decay. cosine and wsd reach learning_rate * final_fraction at the last step."""
    final_fraction: float = key(0.1, change="amend")
    """Learning rate after cosine or wsd, as a fraction of `learning_rate`, in [0, 1]."""
    decay: int = key(0, least=0, change="free")
    """wsd: the last so many steps decay, as 1 - sqrt. A decay starts from any checkpoint with training.steps = its step + decay."""
    rewarmup: int = key(0, least=0, change="amend")
    """Steps of linear warm-up after every change of objective.block_size."""
    clip: float = key(1.0, least=0, change="amend")
    """Largest gradient norm; 0 switches clipping off."""
    spike_deviations: float = key(0.0, least=0, change="free")
    """Leave out a step whose gradient norm exceeds the mean of the last 128 by this many standard deviations (6 is usual); 0:
    only steps whose norm is not a finite number are left out."""
    skipped_in_a_row: int = key(10, least=0, change="free")
    """End the run when more steps than this were left out one after another."""
    ema: float = key(0.9999, least=0)
    """Decay of the averaged weights, below 1, ramped as min(ema, (1 + n) / (10 + n)); 0 switches them off."""
    precision: str = key(
        "auto",
        choices=("auto", "bf16", "fp32"),
        refused={
            "fp16": "its range needs loss scaling, which is not built in, and bf16 needs no loss scaling; set training.precision=bf16",
        },
    )
    """auto: bf16 on CUDA, fp32 on CPU."""
    recompute: str = key("none", choices=("none", "attention", "mlp", "layer"), change="free", former={True: "layer", False: "none"})
    """What a backward computes again instead of keeping it (activation checkpointing). attention: every layer's first half (norm, query,
    key, value, kernel, output); mlp: its second half; layer: both, from the layer's input alone."""
    compile: str = key("none", choices=("none", "blocks", "max-autotune"), change="free", former={True: "blocks", False: "none"})
    """torch.compile. blocks: each layer; max-autotune: each layer, its kernels chosen by timing them (CUDA; minutes at the start, tried
    before the run)."""

    @property
    def states(self) -> States:
        """What its optimizer keeps."""
        return OPTIMIZERS[self.optimizer]


@dataclass
class ValidationConfig:
    """NELBO on a fixed held-out set with fixed noise and the EMA weights."""

    every: int = key(5000, least=0, change="free")
    """Steps between validations; there is one after the last step. 0: only that one."""
    rows: int = key(512, above=0)
    """Held-out rows used (fewer if the set is smaller)."""
    sets: dict[str, str] = key({}, change="free")
    """Other prepared folders whose held-out rows are measured at the same steps, {name: path}: `rows` of each, each with its own lines
    (validation/NAME), plot and name in wandb. The tuner and the summary know only those of `data`."""


@dataclass
class TrackingConfig:
    """What is written down and where."""

    every: int = key(10, above=0)
    """Steps between lines of metrics.jsonl; nothing waits for the device in between."""
    wandb: str = key("disabled", choices=("online", "offline", "disabled"))
    """Whether metrics go to wandb."""
    project: str = "bd3_scale"
    """The project in wandb."""
    entity: str | None = None
    """The team or user in wandb; null: wandb's default."""
    tensorboard: bool = False
    """Whether metrics go to RUN_DIR/tensorboard, too (`pip install 'bd3_scale[tensorboard]'`)."""
    profile: list[int] = key([])
    """[first, last]: a trace of these steps is written into RUN_DIR/profile, and on CUDA a snapshot of the memory; []: none."""
    profile_ranks: list[int] = key([0])
    """The ranks whose steps are profiled."""
    progress: bool = True
    """A progress line on the terminal."""
    plots: bool = True
    """Draw report/*.png, and report/index.html with them, at validations (not so often that it slows the run) and at the end; `bd3 plot`
    draws the pictures at any time."""
    control_variate: bool = False
    """Training lines have a `controlled_loss`, too: the train loss less what its masks alone explain, by the mean nll that the tuner
    (needed for it) measured last. Same mean; a half to a seventh of the variance from step to step."""
    sample_tokens: int = key(0, least=0)
    """Tokens of the texts that are sampled from the last checkpoint when the run ends, one printed and three in report/; 0: none."""


@dataclass
class ParallelConfig:
    """How the ranks share the work. The data-parallel size is what is left of the world: world / (tensor x context x pipeline)."""

    tensor: int = key(1, above=0)
    """Ranks that share every layer: heads, MLP, vocabulary. Keep them on one node."""
    pipeline: int = key(1, above=0)
    """Stages that share the layers."""
    virtual_stages: int = key(1, above=0)
    """Slices of the layers per stage: above 1, the interleaved schedule, whose bubble is that much smaller."""
    stage_layers: list[int] | None = None
    """Layers of each of the pipeline x virtual_stages slices, in order; null: by cost (first embeds, last has the head)."""
    context: int = key(1, above=0)
    """Ranks that share a row, for long ones: each has an early and a late piece of its positions, and gathers the clean keys and values of
    a layer. The blocks of a row must be a multiple of twice as many (or as many); ZeRO divides over these ranks, too."""
    context_exchange: str = key("gather", choices=("gather", "ring"))
    """How these keys travel. gather: a layer has all at once, and keeps them for its backward; ring: those of one rank after another,
    and again in the backward, so that activations fall with the ranks (on CUDA without training.compile). Changes no result."""
    zero: int = key(1, choices=(0, 1, 2, 3))
    """ZeRO stage: what is divided over the data-parallel ranks. 0: nothing; 1: the optimizer; 2: gradients, too; 3: weights, too."""
    engine: str = key("auto", choices=("auto", "deepspeed", "megatron", "fsdp"))
    """Who divides and reduces. deepspeed: one pipeline stage; megatron: megatron-core, ZeRO 0 and 1; fsdp: torch's fully_shard, ZeRO 2 and
    3; auto: megatron for ZeRO 0 and 1, for 2 and 3 deepspeed at one stage and fsdp at several, or where layers are compiled under ZeRO 3.
    Changes no result."""
    shard: int | None = key(None, above=0)
    """Data-parallel ranks that, with their context ranks, share one copy of what ZeRO divides; the others replicate it (HSDP). null: all
    of them."""
    sequence: bool = False
    """Sequence parallelism (needs tensor > 1): norms, dropout and residuals divided over the tensor ranks along the rows."""
    micro_batch: int | None = key(1, above=0)
    """The most rows of data per forward on one replica, each with all its draws; the replica's share of training.global_batch is
    computed in as few forwards as that allows, of equally many rows (batches.py). null: the whole share at once."""
    timeout: int = key(1800, above=0)
    """Seconds after which a collective that does not finish is an error."""
    hang: int = key(20, least=0)
    """Times the longest step, save or validation that the run has known, two minutes at least: a rank whose main thread does nothing
    for so long is a hang, and ends the job (fault_tolerance/hang_watchdog.py). 0: only `timeout` counts."""
    heartbeat: int = key(30, above=0)
    """Seconds of silence after which a rank counts as dead and the whole job ends with its name (rank_monitor.py). Independent of
    how long a step takes; a rank that is killed on a host where others live is noticed within a second or so."""

    @property
    def resolved_engine(self) -> str:
        """deepspeed | megatron | fsdp: what `engine` = auto stands for in this layout."""
        if self.engine != "auto":
            return self.engine
        if self.zero <= 1:
            return "megatron"
        return "deepspeed" if self.pipeline == 1 else "fsdp"

    def shares(self, replicas: int, rows: int, draws: int = 1) -> Shares:
        """How `replicas` data-parallel ranks share a global batch of so many rows of data, each with `draws` draws."""
        return Shares(rows, replicas, self.micro_batch, draws)


@dataclass
class CheckpointConfig:
    """When the state is saved and how much of it is kept."""

    every: int = key(1000, least=0)
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = key(3, least=0)
    """Newest checkpoints kept; older ones are deleted. 0 keeps all."""
    keep_every: int = key(0, least=0)
    """Checkpoints of steps that are multiples of this are kept for ever. 0: none are."""
    fallback: bool = False
    """Where the newest checkpoint is damaged, continue from the newest older whole one and say so, instead of ending with an error."""
    asynchronous: bool = True
    """Training waits only for a copy of the state to host memory (which must have room for it); files are written meanwhile."""
    compare_replicas: bool = True
    """Each save compares a sum of the bits of the weights over the replicas, and is an error where a rank's differ: its memory, device or
    network corrupts data in silence."""
    patience: int = key(3, least=0)
    """Failed saves in a row (a full disk, no permission) that only warn; one more ends the run. The last save must succeed."""
    remote: str | None = None
    """A folder as fsspec names it (s3://bucket/run, gs://...) that every finished checkpoint is copied to, by every rank its own file. A
    run without local checkpoints continues from the newest one there (`run.resume=auto`), which all ranks fetch together."""
    remote_keep: int = key(0, least=0)
    """Newest checkpoints kept there; older ones are deleted, but for those of `keep_every`. 0: nothing is ever deleted there."""
