"""The rules across the keys of a recipe: what a model, a budget and a layout need of each other, and the nearest that works.

Each rule looks at a recipe on a number of ranks and answers with nothing or with a `Problem`: what is wrong, why, and the
cures. Rules stand in a fixed order. Invariants: a cure is only proposed after it was tried, and with it this rule and all
before it hold; one that makes the whole recipe work is preferred to one that leaves a later problem; for a layout there
always is one. No cure touches the model for the sake of the layout, except where a second choice is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bd3_scale.errors import RecipeError
from bd3_scale.recipe.definition import KEYS
from bd3_scale.recipe.mixture_weights import weights_problem
from bd3_scale.recipe.schema import DataConfig
from bd3_scale.recipe.stages import at_least
from bd3_scale.recipe.text import as_text, as_yaml
from bd3_scale.rules.device import DEVICE_RULES
from bd3_scale.rules.network import NETWORK_RULES
from bd3_scale.rules.run import RUN_RULES
from bd3_scale.rules.suggestions import Case, Problem, divisors, fitting_micro_batches, nearest, nearest_layout

if TYPE_CHECKING:
    from bd3_scale.recipe.definition import Recipe


Rule = Callable[[Case], Problem | None]


def check(recipe: Recipe, world_size: int, device: str | None, precision: str | None) -> None:
    """Raise RecipeError with the first rule that does not hold and every cure for it."""
    case = Case(recipe, world_size, device, precision)
    for rule in RULES:
        problem = rule(case)
        if problem is not None:
            cures = [cure for cure in problem.cures() if cure is not None] or [nearest_layout(case, works) or ""]
            raise RecipeError(f"{problem.text}; {', or '.join(dict.fromkeys(cures))}")


# -- The budget and the model ------------------------------------------------------------------------------------------


def length_is_defined_once(case: Case) -> Problem | None:
    steps, tokens = case.recipe.training.steps, case.recipe.training.tokens
    if (steps is None) != (tokens is None):
        return None
    cure = "set training.steps=1000 (or as many as you want)" if steps is None else "set training.tokens=null"
    return Problem("training.steps and training.tokens: exactly one must be set because each defines the length of the run", lambda: [cure])


def fractions_are_fractions(case: Case) -> Problem | None:
    model, training = case.recipe.model, case.recipe.training
    if not model.dropout < 1:
        return Problem(f"model.dropout is {model.dropout} but must be below 1", lambda: ["set model.dropout=0.1"])
    if not training.ema < 1:
        return Problem(f"training.ema is {training.ema} but must be below 1", lambda: ["set training.ema=0.9999", "set training.ema=0"])
    if not all(0 <= beta < 1 for beta in training.betas):
        return Problem(f"training.betas is {list(training.betas)} but both must lie in [0, 1)", lambda: ["set training.betas=[0.9,0.999]"])
    if not 0 <= training.momentum < 1:
        return Problem(f"training.momentum is {training.momentum} but must lie in [0, 1)", lambda: ["set training.momentum=0.95"])
    if not 0 <= training.final_fraction <= 1:
        text = f"training.final_fraction is {training.final_fraction} but must lie in [0, 1]"
        return Problem(text, lambda: ["set training.final_fraction=0.1"])
    return None


def heads_suit_the_width(case: Case) -> Problem | None:
    model = case.recipe.model
    hidden, heads = model.hidden, model.heads
    if model.head_width is not None:
        width = model.head_width
        if model.positions == "learned" or width % 2 == 0:
            return None
        text = f"model.head_width = {width} must be even because rotary positions turn pairs"
        return Problem(text, lambda: [_first(case, heads_suit_the_width, "model.head_width", [width + 1])])
    if hidden % heads:
        text = f"model.heads = {heads} must divide model.hidden = {hidden} because heads share the width equally"
    elif hidden // heads % 2 and model.positions == "rotary":
        text = f"model.hidden / model.heads = {hidden // heads} must be even because rotary positions turn pairs"
    else:
        return None
    widths = [max(1, hidden // (2 * heads) + more) * 2 * heads for more in (0, 1)]
    return Problem(
        text,
        lambda: [
            _first(case, heads_suit_the_width, "model.heads", nearest(divisors(hidden), heads)),
            _first(case, heads_suit_the_width, "model.hidden", nearest(widths, hidden)),
        ],
    )


def key_value_heads_divide_heads(case: Case) -> Problem | None:
    heads, kv_heads = case.recipe.model.heads, case.recipe.model.kv_heads
    if heads % kv_heads == 0:
        return None
    return Problem(
        f"model.key_value_heads = {kv_heads} must divide model.heads = {heads} because query heads share them equally",
        lambda: [_first(case, key_value_heads_divide_heads, "model.key_value_heads", nearest(divisors(heads), kv_heads))],
    )


def mixture_is_sound(case: Case) -> Problem | None:
    data, plain = case.recipe.data, DataConfig()
    if not data.mixture:
        return None
    doubled = {f"data.{name}": getattr(plain, name) for name in ("path", "remote", "format", "source")}
    doubled = {key: default for key, default in doubled.items() if case.value(key) != default}
    if doubled:
        text = f"{' and '.join(doubled)} must not be set because data.mixture says where the data lie"
        return Problem(text, lambda: [as_text(doubled), "set data.mixture=[]"])
    paths = [source.path for source in data.mixture]
    if not all(paths) or len(set(paths)) < len(paths):
        text = f"data.mixture has the paths {paths}, but each source must have one of its own"
        return Problem(text, lambda: ["set each path once, and give one a larger weight to read it more often"])
    formats, known = [source.format for source in data.mixture], KEYS["data.format"].choices
    if not set(formats) <= set(known):
        return Problem(f"data.mixture has the formats {formats}", lambda: [f"set each to one of {', '.join(known)}"])
    if (problem := weights_problem([source.weight for source in data.mixture])) is not None:
        what, cure = problem.split("; ")
        return Problem(f"data.mixture: {what}", lambda: [cure])
    return None


def cache_has_a_remote(case: Case) -> Problem | None:
    data = case.recipe.data
    if data.cache_bytes is None or data.remote is not None or any(source.remote for source in data.mixture):
        return None
    text = f"data.cache_bytes = {data.cache_bytes} bounds the local copy of a remote, but data.remote is null"
    return Problem(
        text, lambda: ["set data.cache_bytes=null", "set data.remote to where the data lie and data.path to a folder for the copy"]
    )


def sample_fits_the_context(case: Case) -> Problem | None:
    recipe = case.recipe
    wanted, context = recipe.tracking.sample_tokens, recipe.model.context
    if wanted <= context or recipe.objective.stages(context)[-1][1] == context or recipe.model.positions != "learned":
        return None
    return Problem(
        f"tracking.sample_tokens = {wanted} must not exceed model.context = {context} because this network learned its positions",
        lambda: [f"set tracking.sample_tokens={context}"],
    )


def time_has_its_conditioning(case: Case) -> Problem | None:
    kind = case.recipe.objective.traits
    if not kind.noise_conditioned or case.recipe.model.conditioning == "adaln":
        return None
    text = f"objective.kind = {kind.name} tells its network how noisy its input is, but model.conditioning = none"
    other = f"set objective.kind={kind.unconditioned}" if kind.unconditioned else None
    return Problem(text, lambda: ["set model.conditioning=adaln", other])


def documents_have_borders(case: Case) -> Problem | None:
    recipe = case.recipe
    sizes = recipe.objective.sizes(recipe.model.context)
    if not recipe.data.document_mask or not recipe.objective.traits.in_blocks or sizes != {recipe.model.context}:
        return None
    return Problem(
        f"data.document_mask is true, but objective.block_size = {recipe.model.context} makes a row one block, inside of which documents "
        "are not kept apart",
        lambda: ["set data.document_mask=false", "set objective.block_size=16"],
    )


# -- The layout --------------------------------------------------------------------------------------------------------


def tensor_divides_heads(case: Case) -> Problem | None:
    tensor, heads = case.parallel.tensor, case.recipe.model.heads
    if heads % tensor == 0:
        return None
    text = f"parallel.tensor = {tensor} must divide model.heads = {heads} because every tensor rank takes whole heads"
    return Problem(text, lambda: [nearest_layout(case, works)])


def tensor_suits_key_value_heads(case: Case) -> Problem | None:
    tensor, heads = case.parallel.tensor, case.recipe.model.kv_heads
    if heads % tensor == 0 or tensor % heads == 0:
        return None
    return Problem(
        f"parallel.tensor = {tensor} must divide model.key_value_heads = {heads}, or be a multiple of it, because a tensor rank takes "
        "whole key/value heads or shares one",
        lambda: [nearest_layout(case, works)],
    )


def tensor_divides_mlp(case: Case) -> Problem | None:
    tensor, units = case.parallel.tensor, case.recipe.model.mlp_size
    if units % tensor == 0:
        return None
    larger = [-(-units // tensor) * tensor]
    return Problem(
        f"parallel.tensor = {tensor} must divide the {units} hidden units of the MLP (model.mlp_hidden) because every tensor rank takes "
        "as many",
        lambda: [nearest_layout(case, works), _first(case, tensor_divides_mlp, "model.mlp_hidden", larger)],
    )


def sequence_divides_rows(case: Case) -> Problem | None:
    tensor, context, ranks = case.parallel.tensor, case.recipe.model.context, case.parallel.context
    if not case.parallel.sequence or (tensor > 1 and context % (tensor * ranks) == 0):
        return None
    if tensor == 1:
        text = "parallel.sequence divides rows over tensor ranks, but parallel.tensor is 1"
    else:
        text = (
            f"parallel.sequence needs model.context = {context} to be a multiple of parallel.tensor{' x parallel.context' * (ranks > 1)} = "
            f"{tensor * ranks} because every tensor rank "
        )
        text += "takes as many rows"
    return Problem(text, lambda: [nearest_layout(case, works)])


def context_divides_rows(case: Case) -> Problem | None:
    """Every context rank takes two pieces of a row, an early one and a late one, so that all see as much; or one block each."""
    ranks, length, objective = case.parallel.context, case.recipe.model.context, case.recipe.objective
    if ranks == 1:
        return None

    def divides(size: int) -> bool:
        if size == length:  # one block, of which every row sees all
            return length % ranks == 0
        return length % (2 * ranks * size) == 0 or length == ranks * size

    wrong = [size for size in sorted(objective.sizes(length)) if not divides(size)]
    if not wrong:
        return None
    size = wrong[0]
    if size == length:
        text = f"parallel.context = {ranks} must divide model.context = {length} because every context rank takes as many positions"
    else:
        what = f"{length // size} blocks of objective.block_size = {size}" if objective.traits.in_blocks else f"{length} positions"
        text = (
            f"parallel.context = {ranks} divides a row of {what} in {2 * ranks} equal pieces, an early and a late one for each context "
            f"rank so that all see as much, or in {ranks} pieces of a block: it must have a multiple of {2 * ranks} of them, or {ranks}"
        )
    fewer = nearest(range(1, ranks), ranks)
    return Problem(text, lambda: [_first(case, context_divides_rows, "parallel.context", fewer), nearest_layout(case, works)])


def virtual_stages_have_stages(case: Case) -> Problem | None:
    virtual = case.parallel.virtual_stages
    if virtual == 1 or case.parallel.pipeline > 1:
        return None
    text = f"parallel.virtual_stages = {virtual} interleaves pipeline stages, but parallel.pipeline is 1"
    return Problem(text, lambda: [nearest_layout(case, works)])


def every_stage_has_a_layer(case: Case) -> Problem | None:
    chunks, layers = case.parallel.pipeline * case.parallel.virtual_stages, case.recipe.model.layers
    if chunks <= layers:
        return None
    text = (
        f"parallel.pipeline x parallel.virtual_stages = {chunks} must not exceed model.layers = {layers} because every stage takes a layer"
    )
    return Problem(text, lambda: [nearest_layout(case, works)])


def given_layers_sum_up(case: Case) -> Problem | None:
    given, chunks, layers = case.parallel.stage_layers, case.parallel.pipeline * case.parallel.virtual_stages, case.recipe.model.layers
    if given is None or (len(given) == chunks and sum(given) == layers and min(given) > 0):
        return None
    return Problem(
        f"parallel.stage_layers = {given} must be {chunks} numbers above 0 (parallel.pipeline x parallel.virtual_stages) that sum up to "
        f"model.layers = {layers}; null divides by cost",
        lambda: [nearest_layout(case, works)],
    )


def engine_suits_the_layout(case: Case) -> Problem | None:
    engine, zero, pipeline = case.parallel.engine, case.parallel.zero, case.parallel.pipeline
    values: list[int] = []
    if engine == "deepspeed" and pipeline > 1:
        text = f"parallel.engine = deepspeed runs one stage, but parallel.pipeline = {pipeline}"
    elif engine == "megatron" and zero > 1:
        values = [1]
        text = f"parallel.engine = megatron divides optimizer states at most, but parallel.zero = {zero} divides gradients, too"
    elif engine == "fsdp" and zero < 2:
        values = [2]
        text = f"parallel.engine = fsdp always divides gradients, but parallel.zero = {zero} keeps them whole"
    else:
        return None
    keys: dict[str, list[Any]] = {"parallel.engine": ["auto"], "parallel.zero": values}
    return Problem(
        text, lambda: [*(_first(case, engine_suits_the_layout, key, some) for key, some in keys.items()), nearest_layout(case, works)]
    )


def copies_are_divided(case: Case) -> Problem | None:
    """DeepSpeed's partitions of ZeRO 3 on a node (`zero_hpz_partition_size`) are no such copies: states stay divided over all ranks, and
    the weights of a forward are kept a second time for its backward. megatron-core has them, but not on a CPU, where all is tested."""
    shard, engine, zero, replicas = case.parallel.shard, case.parallel.resolved_engine, case.parallel.zero, case.replicas
    if shard is None or (engine == "fsdp" and replicas % shard == 0 and (shard > 1 or replicas == 1)):
        return None
    rule = copies_are_divided
    if engine != "fsdp":
        text = f"parallel.shard = {shard} makes copies that as many ranks share, which parallel.engine = {engine} cannot"
        return Problem(text, lambda: [_first(case, rule, "parallel.engine", ["fsdp"]), _first(case, rule, "parallel.shard", [None])])
    if shard == 1:
        text = f"parallel.shard = 1 would divide nothing, but parallel.zero = {zero} divides"
    else:
        text = f"parallel.shard = {shard} must divide the data-parallel ranks = {replicas} because as many ranks share every copy"
    sizes = nearest([size for size in divisors(replicas) if size > 1], shard)
    return Problem(text, lambda: [_first(case, rule, "parallel.shard", [*sizes, None]), nearest_layout(case, works)])


def masters_are_fp32(case: Case) -> Problem | None:
    if case.precision != "bf16" or case.parallel.zero > 0:
        return None
    text = "parallel.zero = 0 keeps no fp32 copy of bf16 weights, so small updates would be lost"
    return Problem(text, lambda: [nearest_layout(case, works)])


def world_is_whole_replicas(case: Case) -> Problem | None:
    ranks, world_size = case.model_ranks, case.world_size
    if world_size % ranks == 0:
        return None
    factors = f"parallel.tensor x {'parallel.context x ' * (case.parallel.context > 1)}parallel.pipeline"

    def other_worlds() -> str | None:
        fitting = world_size // ranks
        counts = [fitting + 1, fitting, *range(fitting + 2, fitting + 66), *range(fitting - 1, 0, -1)]
        found = (count * ranks for count in counts if count > 0 and works(replace(case, world_size=count * ranks)))
        return next((f"start {world} ranks" for world in found), None)

    return Problem(
        f"the world of {world_size} ranks must be a multiple of {factors} = {ranks} because every replica of the model takes that many",
        lambda: [other_worlds(), nearest_layout(case, works)],
    )


def every_replica_has_a_row(case: Case) -> Problem | None:
    asked, batch, replicas = case.recipe.training.global_batch, case.recipe.batches.smallest, case.replicas
    draws = case.recipe.objective.draws
    if replicas <= batch:
        return None
    # An interleaved schedule needs more than one.
    rows = (at_least(asked, replicas * count * draws) for count in range(1, case.parallel.pipeline + 1))

    def fewer_replicas() -> str | None:
        """The same rows: more ranks for each replica."""
        return nearest_layout(
            case, works, accepted=lambda found: case.world_size // (found.tensor * found.context * found.pipeline) <= batch
        )

    def cures() -> list[str | None]:
        found = [_first(case, every_replica_has_a_row, "training.global_batch", rows), fewer_replicas()]
        return found if len(case.recipe.batches.phases) == 1 else found[::-1]  # a run cannot change the batches that it has had

    return Problem(
        f"training.global_batch = {as_yaml(asked)} must be at least the data-parallel ranks = {replicas} because each needs a row"
        + (f" with its objective.draws = {draws}" if draws > 1 else ""),
        cures,
    )


def stages_are_interleaved_by_enough(case: Case) -> Problem | None:
    parallel, shares = case.parallel, case.shares
    if parallel.virtual_stages == 1 or shares.micro_batches >= parallel.pipeline:
        return None
    return Problem(
        f"parallel.virtual_stages = {parallel.virtual_stages} needs as many micro-batches as parallel.pipeline = {parallel.pipeline}, but "
        f"training.global_batch = {as_yaml(case.recipe.training.global_batch)} makes {shares.micro_batches} of "
        f"{shares.micro_batch} rows on every replica",
        lambda: [
            _first(case, stages_are_interleaved_by_enough, "parallel.micro_batch", fitting_micro_batches(case)),
            _first(case, stages_are_interleaved_by_enough, "parallel.virtual_stages", [1]),
        ],
    )


MODEL_RULES: tuple[Rule, ...] = (
    length_is_defined_once,
    fractions_are_fractions,
    heads_suit_the_width,
    key_value_heads_divide_heads,
    *NETWORK_RULES,
    mixture_is_sound,
    cache_has_a_remote,
    *RUN_RULES,
    *DEVICE_RULES,
    sample_fits_the_context,
    time_has_its_conditioning,
    documents_have_borders,
)
LAYOUT_RULES: tuple[Rule, ...] = (
    tensor_divides_heads,
    tensor_suits_key_value_heads,
    tensor_divides_mlp,
    sequence_divides_rows,
    context_divides_rows,
    virtual_stages_have_stages,
    every_stage_has_a_layer,
    given_layers_sum_up,
    engine_suits_the_layout,
    masters_are_fp32,
    world_is_whole_replicas,
    copies_are_divided,
    every_replica_has_a_row,
    stages_are_interleaved_by_enough,
)
RULES = MODEL_RULES + LAYOUT_RULES
"""In the order in which they are asked. For a sound model some layout satisfies all of the second kind."""


def works(case: Case) -> bool:
    return all(rule(case) is None for rule in RULES)


def _first(case: Case, rule: Rule, key: str, values: Iterable[Any]) -> str | None:
    """The first value of a key with which everything works; for a model's rule else the first with which it and all before
    it hold, since what is wrong with the layout, too, is said next."""
    before = RULES[: RULES.index(rule) + 1]
    holds = [value for value in values if all(other(case.changed({key: value})) is None for other in before)]
    whole = [value for value in holds if works(case.changed({key: value}))]
    chosen = whole or (holds if rule in MODEL_RULES else [])
    return as_text({key: chosen[0]}) if chosen else None
