"""A recipe: nested dataclasses, read from YAML and dotted overrides, checked before anything is started.

Every section is the dataclass beside the code that it configures; this file composes them, holds the rules of single keys
and asks `recipe_rules.py` for those across keys. Invariants: an unknown key, a wrong type or an impossible combination is a
`RecipeError` of one line that names the key, what is wrong and what to set; nothing is silently changed; nothing here touches
torch.distributed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bd3_scale import recipe_rules, recipe_rules_device
from bd3_scale.checkpoint.config import CheckpointConfig
from bd3_scale.data.batches import BatchSchedule, batch_schedule
from bd3_scale.data.config import DataConfig
from bd3_scale.data.shares import Shares
from bd3_scale.diffusion.config import ROW_MULTIPLE, SELECTED_MULTIPLE, ObjectiveConfig, TunerConfig, block_sizes
from bd3_scale.errors import RecipeError
from bd3_scale.model.config import ModelConfig
from bd3_scale.parallel.config import ParallelConfig
from bd3_scale.recipe_cures import as_text, as_yaml
from bd3_scale.runtime.config import RunConfig, TrackingConfig, TrainingConfig, ValidationConfig

if TYPE_CHECKING:
    from bd3_scale.data.tokenizer import Tokenizer
    from bd3_scale.diffusion.objectives import Objective


@dataclass
class Recipe:
    """Everything that defines a run. See each section's class for its keys."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.tokens is not None, "validate() asks for one of the two"
        return self.batches.steps_for(-(-self.training.tokens // self.model.context))

    @property
    def batches(self) -> BatchSchedule:
        """The global batch of every update."""
        return batch_schedule(self.training.global_batch)

    def shares(self, replicas: int, rows: int) -> Shares:
        """How `replicas` data-parallel ranks share a global batch of so many rows."""
        return Shares(rows, replicas, self.parallel.micro_batch)

    def every_shares(self, replicas: int) -> list[Shares]:
        """The same of every global batch of the run."""
        return [self.shares(replicas, phase.rows) for phase in self.batches.phases]

    def micro_batch(self, replicas: int) -> int:
        """The most rows per forward where the global batch is shared by `replicas` data-parallel ranks."""
        return max(shares.micro_batch for shares in self.every_shares(replicas))

    def tokens_before(self, step: int) -> int:
        """Data tokens of the first `step` updates."""
        return self.batches.samples_before(step) * self.model.context

    def objective_at(self, tokenizer: Tokenizer, step: int, interval: tuple[float, float] | None = None, device: str = "cpu") -> Objective:
        """The objective of update `step` on `interval` (None: the recipe's), for rows of this tokenizer's ids, in shapes for `device`."""
        document_end = tokenizer.end_of_text if self.data.document_mask else None
        return self.objective_of(tokenizer.mask_id, step, device, document_end, interval)

    def objective_of(
        self, mask_id: int, step: int, device: str, document_end: int | None, interval: tuple[float, float] | None = None
    ) -> Objective:
        """As `objective_at`, where the ids are known and the tokenizer is not."""
        from bd3_scale.diffusion.objectives import objective_at

        ranks = self.parallel.tensor if self.parallel.sequence else 1
        rows = math.lcm(ROW_MULTIPLE[device], ranks)
        selected = self.selected_multiple(device)
        return objective_at(self.objective, self.model.context, mask_id, step, interval, selected, document_end, rows)

    def selected_multiple(self, device: str) -> int:
        """What the number of selected positions of a micro-batch is padded to: sequence parallelism divides them over its ranks."""
        return math.lcm(SELECTED_MULTIPLE[device], self.parallel.tensor if self.parallel.sequence else 1)


CHOICES = {
    "run.resume": ("auto", "never", "fresh"),
    "run.device": ("auto", "cpu", "cuda"),
    "model.positions": ("rotary", "learned"),
    "model.attention_bias": ("none", "query_key_value", "all"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.mlp": ("gelu", "swiglu"),
    "model.conditioning": ("none", "adaln"),
    "model.attention": ("auto", "flex", "flex_triton", "flex_flash", "tiled", "dense"),
    "model.head_loss": ("eager", "fused"),
    "objective.clean_half": ("block_causal", "causal"),
    "data.format": ("mds", "webdataset"),
    "data.source": (None, "documentation"),
    "data.row_special": ("none", "bos", "bos_eos"),
    "training.schedule": ("constant", "cosine", "wsd"),
    "training.precision": ("auto", "bf16", "fp32"),
    "training.recompute": ("none", "attention", "mlp", "layer"),
    "training.compile": ("none", "blocks", "max-autotune"),
    "parallel.zero": (0, 1, 2, 3),
    "parallel.engine": ("auto", "deepspeed", "megatron", "fsdp"),
    "tracking.wandb": ("online", "offline", "disabled"),
}

REFUSED_CHOICES = {
    ("training.precision", "fp16"): "its range needs loss scaling, which is not built in, and bf16 needs no loss scaling; "
    "set training.precision=bf16",
}
"""Values that people expect to work, each with why it does not."""

FORMER = {
    "training.recompute": {True: "layer", False: "none"},
    "training.compile": {True: "blocks", False: "none"},
}
"""Keys that once were true or false: what these mean in a saved recipe, and the cure where somebody writes them."""

POSITIVE = (
    "run.time_limit", "run.threads",
    "model.context", "model.layers", "model.hidden", "model.heads", "model.conditioning_size", "model.key_value_heads", "model.mlp_hidden",
    "model.initial_std", "model.rotary_base", "model.head_width", "model.norm_epsilon",
    "data.source_tokens", "data.window", "data.cache_bytes", "training.steps", "training.tokens",
    "training.learning_rate", "training.epsilon",
    "validation.rows", "parallel.tensor", "parallel.pipeline",
    "parallel.virtual_stages", "parallel.context", "parallel.shard", "parallel.micro_batch", "parallel.timeout", "parallel.heartbeat",
    "tracking.every",
)  # fmt: skip
NOT_NEGATIVE = (
    "run.seed", "training.weight_decay", "training.warmup", "training.clip", "training.spike_deviations", "training.skipped_in_a_row",
    "training.ema", "training.decay", "training.rewarmup", "validation.every", "checkpoint.every", "checkpoint.keep",
    "checkpoint.keep_every", "checkpoint.patience", "checkpoint.remote_keep", "parallel.hang",
    "data.prefetch", "data.download_ahead", "model.dropout", "tracking.sample_tokens",
)  # fmt: skip

FREE_TO_CHANGE = {
    "run.name", "run.dir", "run.resume", "run.amend", "run.time_limit", "run.device", "run.threads", "model.attention", "model.head_loss",
    "data.path", "data.remote", "data.tokenizer", "data.prefetch", "data.cache_bytes", "data.download_ahead", "data.source", "data.format",
    "training.steps", "training.tokens", "training.decay", "training.recompute", "training.compile", "training.spike_deviations",
    "training.skipped_in_a_row", "validation.every", "parallel", "checkpoint", "tracking",
}  # fmt: skip
"""What a continued run may have otherwise than the run it continues (of the tokenizer, its place); everything else is the run."""
AMENDABLE = {
    "run.seed", "data.skip", "objective.interval", "objective.resample", "tuner.enabled", "tuner.every", "tuner.start_step", "tuner.margin",
    "tuner.rows", "training.learning_rate", "training.betas", "training.weight_decay", "training.warmup", "training.schedule",
    "training.final_fraction", "training.rewarmup", "training.clip",
}  # fmt: skip
"""What it may change from a step on where `run.amend` names it."""


def load(path: str | Path, overrides: list[str] | None = None, *, saved: bool = False) -> Recipe:
    """Defaults, then the YAML file, then `dotted.key=value` overrides. Raises RecipeError; does not `validate`.

    `saved`: the file was written by this program, maybe by an earlier version: former values are read as what they mean now.
    """
    path = Path(path)
    try:
        text = OmegaConf.load(path)
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist; name a YAML file, for example recipes/quickstart.yaml") from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {path} is a folder; name the YAML file inside it") from None
    except Exception as error:  # YAML errors have no common base that OmegaConf exports
        raise RecipeError(f"recipe {path} is not valid YAML: {_one_line(error)}; mend the line named") from None
    if not isinstance(text, DictConfig):
        raise RecipeError(f"recipe {path} must hold sections such as `model:` and `training:`, not {type(text).__name__}")
    for item in overrides or []:
        key, sign, _ = item.partition("=")
        if not sign or not key or key.startswith("-"):
            raise RecipeError(f"override {item!r} must have the form dotted.key=value, without dashes")
    if saved:
        _renew(text)
    try:
        written = text, OmegaConf.from_dotlist(overrides or [])
        for part in written:
            _check_written(OmegaConf.to_container(part, resolve=False))
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), *written)
        OmegaConf.resolve(merged)
        recipe = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        full_key = getattr(error, "full_key", None)
        where = f"{full_key}: " if full_key else ""
        raise RecipeError(f"{where}{_one_line(error)}; see the sections' classes in bd3_scale/*/config.py for all keys") from None
    assert isinstance(recipe, Recipe)
    if isinstance(recipe.training.global_batch, str) and recipe.training.global_batch.isdecimal():  # of an environment variable
        recipe.training.global_batch = int(recipe.training.global_batch)
    if recipe_rules_device.compiled_in_pieces(recipe) and recipe.parallel.engine == "auto":
        recipe.parallel.engine = "fsdp"
    return recipe


def _renew(text: DictConfig) -> None:
    """Replace the values of `FORMER` by today's."""
    for key, meanings in FORMER.items():
        value = OmegaConf.select(text, key)
        if isinstance(value, bool):
            OmegaConf.update(text, key, meanings[value])


def _check_written(written: Any) -> None:
    """Refuse what OmegaConf would take for something else (3 for true) or refuse without naming the key."""
    for section in fields(Recipe):
        if section.name not in written:
            continue
        values, plain = written[section.name], getattr(Recipe(), section.name)
        types = get_type_hints(type(plain))
        if not isinstance(values, dict):
            example = as_text({f"{section.name}.{name}": getattr(plain, name) for name in list(types)[:1]})
            raise RecipeError(f"{section.name} is {as_yaml(values)} but is a section; {example} and so on, each key by itself")
        for name, value in values.items():
            key, kind = f"{section.name}.{name}", types.get(name)
            if isinstance(value, str) and "${" in value:
                continue  # known only when it is resolved
            if kind is bool and not isinstance(value, bool):
                raise RecipeError(f"{key} is {as_yaml(value)} but must be true or false; set {key}=true, or set {key}=false")
            if isinstance(value, bool) and key in FORMER:
                choices = ", ".join(str(choice) for choice in CHOICES[key])
                raise RecipeError(
                    f"{key} is {as_yaml(value)} but is one of {choices}; {as_text({key: FORMER[key][value]})} for what {as_yaml(value)} was"
                )
            if get_origin(kind) is tuple:
                numbers = value if isinstance(value, list) else []
                if len(numbers) != len(get_args(kind)) or not all(type(one) in (int, float) or "${" in str(one) for one in numbers):
                    example = as_text({key: getattr(plain, name)})
                    raise RecipeError(f"{key} is {as_yaml(value)} but must be {len(get_args(kind))} numbers; {example}, for example")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type=")))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; `load` of it gives the same recipe again."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def flatten(recipe: Recipe) -> dict[str, Any]:
    """{dotted key: value}."""
    return {
        f"{section.name}.{item.name}": getattr(getattr(recipe, section.name), item.name)
        for section in fields(recipe)
        for item in fields(getattr(recipe, section.name))
    }


def validate(recipe: Recipe, world_size: int = 1, device: str | None = None) -> None:
    """Refuse what cannot work on `world_size` ranks. Raises RecipeError with the first problem found."""
    flat, defaults = flatten(recipe), flatten(Recipe())
    for key, value in flat.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        _need(finite, f"{key} is {as_yaml(value)} but must be finite; {as_text({key: defaults[key]})}, for example")
    for (key, refused), why in REFUSED_CHOICES.items():
        _need(flat[key] != refused, f"{key} is {refused}, but {why}")
    for key, allowed in CHOICES.items():
        _need(flat[key] in allowed, f"{key} is {flat[key]!r}; set one of {', '.join(str(choice) for choice in allowed)}")
    for key in POSITIVE:
        cure = as_text({key: 1000 if key in ("training.steps", "training.tokens") else defaults[key]})
        _need(flat[key] is None or flat[key] > 0, f"{key} is {flat[key]} but must be above 0; {cure}, for example")
    for key in NOT_NEGATIVE:
        _need(flat[key] >= 0, f"{key} is {flat[key]} but must not be negative; {as_text({key: defaults[key]})}, for example")
    batch_schedule(recipe.training.global_batch)
    recipe_rules.check(recipe, world_size, device, resolve_precision(recipe, device) if device is not None else None)
    from bd3_scale.diffusion.objectives import build_objective
    from bd3_scale.diffusion.tuner import check_tuner

    build_objective(recipe.objective, recipe.model.context, mask_id=1, document_end=0 if recipe.data.document_mask else None)
    check_tuner(recipe.tuner, recipe.objective)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def resolve_precision(recipe: Recipe, device: str) -> str:
    """fp32 or bf16 for `auto`: bf16 on CUDA, fp32 on CPU."""
    if recipe.training.precision != "auto":
        return recipe.training.precision
    return "bf16" if device == "cuda" else "fp32"


def resolve_device(recipe: Recipe) -> str:
    """cpu or cuda for `auto`. Raises RecipeError where CUDA is asked for and not there."""
    import torch

    if recipe.run.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("run.device is cuda, but torch finds no CUDA device here; set run.device=cpu or install a CUDA build of torch")
    return recipe.run.device if recipe.run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def world_size_of_environment() -> int:
    """Ranks that torchrun or SLURM's srun through torchrun started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def compare(saved: Recipe, asked: Recipe, step: int, since: Mapping[str, int] | None = None) -> dict[str, tuple[Any, Any]]:
    """Refuse to continue a run at `step` under a recipe that would make it another run. Raises RecipeError naming the first
    such key. Block sizes and batches of later steps may change: the past must be as it was. Returns what `run.amend` lets change:
    {key: (saved, asked)}. `since`: the steps at which keys were amended before."""
    amended = {}
    before, now = flatten(saved), flatten(asked)
    for flat in (before, now):
        flat["data.mixture"] = [source.weight for source in flat["data.mixture"]]  # where they lie may change, as data.path
        flat["objective.block_size"] = [list(stage) for stage in block_sizes(flat["objective.block_size"]) if stage[0] < max(step, 1)]
    if _past_batches(saved, step) == _past_batches(asked, step):
        now["training.global_batch"] = before["training.global_batch"]
    for key, value in now.items():
        if key in FREE_TO_CHANGE or key.split(".")[0] in FREE_TO_CHANGE:
            continue
        if before.get(key) == value:
            continue
        if key not in asked.run.amend:
            amended_at = f" since step {since[key]}" if since and key in since else ""
            amend = f", or run.amend=[{key}] to change it from step {step} on" if key in AMENDABLE else ""
            raise RecipeError(
                f"{key} is {value} but the run being continued has {before.get(key)}{amended_at}, and it defines the run; "
                f"set {key}={before.get(key)} or another run.dir{amend}"
            )
        amended[key] = before.get(key), value
    return amended


def _past_batches(recipe: Recipe, step: int) -> list[tuple[int, int]]:
    return [(phase.step, phase.rows) for phase in recipe.batches.phases if phase.step < max(step, 1)]


def as_dictionary(recipe: Recipe) -> dict[str, Any]:
    assert is_dataclass(recipe)
    return asdict(recipe)
