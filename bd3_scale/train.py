"""`python -m bd3_scale.train RECIPE [key=value ...]`, alone or under torchrun: build the parts, run the loop.

Exit status: 0 when the budget is spent or the run was asked to stop (its state is saved), 2 for a recipe that cannot work
(found before any process group exists), 1 for data or checkpoints that cannot be used. Errors are one line each. A recipe that does not
fit an elastic world, but a larger one that may come, waits for its nodes: see `launching.elastic`.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_scale import recipe as recipes
from bd3_scale.errors import RecipeError, UserError
from bd3_scale.fault_tolerance.early_exit import exit_on_early_signal
from bd3_scale.launcher import launched
from bd3_scale.launching.elastic import wait_for_nodes
from bd3_scale.messages import show
from bd3_scale.program import run_program
from bd3_scale.rules.validate import validate

if TYPE_CHECKING:
    from bd3_scale.distributed.layout import Layout
    from bd3_scale.fault_tolerance.rank_monitor import RankMonitor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bd3 train", description="Train a block-diffusion language model.")
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe, for example quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example training.steps=100")
    options = parser.parse_args(arguments)
    show()
    told, started = launched(), False
    rank, world_size = told.rank, told.world_size
    try:
        with exit_on_early_signal(leader=rank == 0, last=arguments is None):
            recipes.settle()
            recipe = recipes.load(options.recipe, options.overrides)
            device = recipes.resolve_device(recipe.run.device)
            try:
                validate(recipe, world_size, device)
            except RecipeError as misfit:
                wait_for_nodes(recipe, device, misfit)
                raise
            started = True
            run(recipe, device)
    except UserError as error:
        if not started:
            return error.say() if rank == 0 else error.exit_code  # every rank finds the same
        where = f"[rank {rank}] " if world_size > 1 and not error.shared else ""
        speaks = not error.shared or told.local_rank == 0
        if speaks:
            error.say("\nbd3_scale", where)  # below the progress line
        if world_size > 1:
            time.sleep(0.0 if speaks else 2.0)  # the launcher ends all ranks when the first leaves, also one that has still to speak
            # Others may wait for this rank in a collective that will not come: the launcher ends them when it leaves.
            os._exit(error.exit_code)
        return error.exit_code
    return 0


def run(recipe: recipes.Recipe, device: str) -> None:
    """Join the world, train, leave it."""
    from bd3_scale.distributed import layout as layouts
    from bd3_scale.fault_tolerance.agreement import agree, recipe_and_versions
    from bd3_scale.fault_tolerance.hang_watchdog import record_collectives
    from bd3_scale.fault_tolerance.rank_monitor import RankMonitor
    from bd3_scale.launcher import set_threads

    if device == "cpu":
        set_threads(recipe.run.threads)
    else:
        record_collectives(Path(recipe.run.dir) / "stacks")
    layout = layouts.start(recipe.parallel, device, joined=lambda: agree(recipe_and_versions(recipe, device), layouts.all_gather))
    with RankMonitor(layout.rank, layout.world_size, recipe.parallel.heartbeat, world=layout.world) as monitor:
        train(recipe, layout, monitor)
        layout.barrier()
    layouts.stop()


def train(recipe: recipes.Recipe, layout: Layout, monitor: RankMonitor | None = None) -> None:
    """The run itself, on this rank of a world that exists; at its end samples, made by the leader and its tensor peers."""
    from bd3_scale.reporting.samples import sample_texts
    from bd3_scale.reporting.web_page import add_samples

    checkpoint, stopped = _optimize(recipe, layout, monitor)
    if stopped or not recipe.tracking.sample_tokens or layout.state_rank > 0 or layout.pipeline_rank > 0:
        return
    gc.collect()  # the state of the training goes before the network comes once more
    samples = sample_texts(checkpoint, layout.device.type, recipe.tracking.sample_tokens, recipe.run.seed)
    if layout.is_main_rank:
        print(f"\na sample of {recipe.tracking.sample_tokens} tokens:\n{samples[0].text}", flush=True)
        add_samples(recipe, layout.world_size, samples)


def _optimize(recipe: recipes.Recipe, layout: Layout, monitor: RankMonitor | None) -> tuple[Path, bool]:
    """Run the loop to its end and print the summary. Returns the last checkpoint and whether the run was stopped before the end."""
    from bd3_scale.data.open import open_data
    from bd3_scale.fault_tolerance.agreement import agree, data_and_tokenizer
    from bd3_scale.fault_tolerance.hang_watchdog import collectives, watchdog
    from bd3_scale.fault_tolerance.rank_monitor import Work
    from bd3_scale.reporting.summary import summary
    from bd3_scale.training.build import build_parts
    from bd3_scale.training.trainer import Trainer

    with open_data(
        recipe.data, recipe.model.context, leader=layout.local_rank == 0, barrier=layout.barrier, progress=layout.is_main_rank
    ) as data:
        agree(data_and_tokenizer(data), layout.all_gather)
        trainer = Trainer(build_parts(recipe, layout, data))
        with watchdog(trainer.heartbeat, layout, recipe.parallel, Path(recipe.run.dir) / "stacks", monitor) as dog:
            work = Work(lambda: trainer.step, collectives, on_verdict=lambda: None if trainer.owner.lost else dog.dump())
            with nullcontext() if monitor is None else monitor.following(work):
                checkpoint = trainer.run()
    stopped = (trainer.stop.requested or "another rank") if trainer.step < trainer.total_steps else None
    if layout.is_main_rank:
        text = summary(
            recipe, step=trainer.step, checkpoint=checkpoint, validated=trainer.validated, unigram=trainer.unigram, stopped=stopped
        )
        print(text, flush=True)
    return checkpoint, stopped is not None


if __name__ == "__main__":
    run_program(main)
