"""`python -m bd3_scale.evaluate likelihood|generation CHECKPOINT`: how good a checkpoint is, for people or as JSON.

Under torchrun the processes share the work: each (or each group of `--tensor` of them) holds the network and has rows of its own (or,
with `--context`, positions of rows); the first one speaks and writes. Exit status: 0 when the result is written, 2 for options that
cannot work, 1 for a checkpoint, data folder or tokenizer that cannot be used. Errors are one line each.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_scale.cli import CommandParser, end_with, own_world, rank_and_size
from bd3_scale.errors import RecipeError, UserError
from bd3_scale.messages import show
from bd3_scale.program import run_program
from bd3_scale.sample import add_sampler_options, chosen

if TYPE_CHECKING:
    from bd3_scale.data.loader import Rows
    from bd3_scale.distributed.layout import Layout
    from bd3_scale.generation.load_model import LoadedNetwork


def _parser() -> CommandParser:
    parser = CommandParser(prog="bd3 evaluate", description="Evaluate a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="likelihood|generation", parser_class=CommandParser)
    _likelihood_options(commands.add_parser("likelihood", help="NELBO and perplexity with standard error on prepared rows"))
    _generation_options(commands.add_parser("generation", help="texts: lengths, entropy, network calls, generative perplexity"))
    return parser


def _common_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", help="a checkpoint folder, or a run directory (its latest checkpoint)")
    add("--block-size", type=int, metavar="L'", help="of a network trained with several block sizes: which; default: the most frequent")
    add("--weights", default="auto", help="auto | ema | weight; auto takes the averaged weights where there are any")
    add("--device", default="auto", help="auto | cpu | cuda")
    add("--tensor", type=int, metavar="T", help="processes that share one network, the others work on other rows; default 1")
    add("--json", action="store_true", help="print one JSON document")


def _likelihood_options(parser: argparse.ArgumentParser) -> None:
    _common_options(parser)
    add = parser.add_argument
    add("--context", type=int, metavar="C", help="networks that divide each row by positions, for long rows; default 1")
    add("--data", type=Path, metavar="FOLDER", help="a prepared data folder; default: the data that the checkpoint was trained on")
    add("--zero-shot", metavar="SET", help="a set of the paper's zero-shot table: ptb, wikitext103, lm1b, lambada, ag_news, pubmed, arxiv")
    add("--source", metavar="FILE", help="of --zero-shot: the file, folder or pattern that holds the text of the set")
    add("--cache", type=Path, metavar="FOLDER", help="of --zero-shot: where its rows are kept; default ~/.cache/bd3_scale/zero-shot")
    add("--split", default="validation", help="validation | train; default validation")
    add("--rows", type=int, metavar="N", help="the first N rows; default: all")
    add("--draws", type=int, default=1, metavar="K", help="draws of noise per row; more narrow the error of a bound")
    add("--seed", type=int, help="of the noise; default: the run's, so that its own validation comes out")
    add("--micro-batch", type=int, metavar="M", help="rows of a forward")
    add("--row-values", action="store_true", help="with --json: the NELBO of every row too, for paired comparisons")


def _generation_options(parser: argparse.ArgumentParser) -> None:
    _common_options(parser)
    parser.set_defaults(context=None)  # a text is written token by token
    add = parser.add_argument
    add("--samples", type=int, required=True, metavar="N", help="texts")
    add("--output", type=Path, required=True, metavar="FOLDER", help="a new folder for samples.jsonl, summary.json, lengths.png, page.html")
    add("--judge", type=Path, metavar="DIR", help="a `transformers` directory, or a checkpoint of objective.kind=ar: generative perplexity")
    add("--beside", type=Path, nargs="+", default=[], metavar="FOLDER", help="earlier --output folders to show on the same page")
    add("--length", type=int, metavar="L", help="tokens per text, with its beginning; default: the training context")
    add("--batch-size", type=int, default=1, metavar="B", help="texts made together; NFE is that of the batch; default 1")
    add_sampler_options(parser)


def main(argv: list[str] | None = None) -> int:
    show()
    try:
        options = _parser().parse_args(argv)
        if options.command == "generation" and options.output.exists():
            raise RecipeError(f"--output {options.output} exists already; name a new folder")
        _run(options)
    except UserError as error:
        return end_with(error)
    return 0


def _run(options: argparse.Namespace) -> None:
    with own_world():
        from bd3_scale.evaluation.world import load_replicas
        from bd3_scale.fault_tolerance.rank_monitor import RankMonitor

        loaded, layout = load_replicas(
            options.checkpoint,
            tensor=options.tensor,
            context=options.context,
            weights=options.weights,
            device=options.device,
            block_size=options.block_size,
        )
        with RankMonitor(
            *rank_and_size(),
            loaded.recipe.parallel.heartbeat,
            world=layout.world,
            cure="start the same command again, nothing was written",
        ):
            document, text = COMMANDS[options.command](loaded, layout, options)
    if layout.is_main_rank:
        print(json.dumps(document, indent=1) if options.json else text)


def _of_checkpoint(loaded: LoadedNetwork, layout: Layout) -> dict[str, Any]:
    return {
        "checkpoint": str(loaded.checkpoint.path),
        "step": loaded.checkpoint.step,
        "weights": loaded.weights,
        "objective": loaded.objective.kind,
        "block_size": loaded.objective.block_size,
        "device": str(loaded.device),
        "processes": layout.world_size,
    }


def _likelihood(loaded: LoadedNetwork, layout: Layout, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from bd3_scale.evaluation.likelihood import MICRO_BATCH, evaluate_likelihood, require_likelihood

    require_likelihood(loaded)  # before rows are opened, or prepared
    start = time.perf_counter()
    rows, name = _rows(loaded, layout, options)
    result = evaluate_likelihood(
        loaded,
        rows,
        layout,
        count=options.rows,
        draws=options.draws,
        seed=options.seed,
        micro_batch=MICRO_BATCH if options.micro_batch is None else options.micro_batch,
        progress=not options.json,
    )
    document = {
        **_of_checkpoint(loaded, layout),
        "data": name,
        "split": None if options.zero_shot else options.split,
        "rows": len(result.row_nelbo),
        "tokens": int(result.row_tokens.sum()),
        "draws": result.draws,
        "seed": loaded.recipe.run.seed if options.seed is None else options.seed,
        "exact": result.exact,
        "nelbo": result.nelbo,
        "standard_error": None if len(result.row_nelbo) < 2 else result.standard_error,
        "perplexity": result.perplexity,
        "seconds": time.perf_counter() - start,
    }
    if options.row_values:
        document["row_nelbo"] = result.row_nelbo.tolist()
    what = "negative log-likelihood (exact)" if result.exact else "NELBO"
    text = (
        f"{name if options.zero_shot else f'{name}, {options.split}'}: {document['rows']:,} rows, {document['tokens']:,} tokens\n"
        f"{what} {result.nelbo:.4f} +- {result.standard_error:.4f} nats per token, perplexity "
        f"{'' if result.exact else '<= '}{result.perplexity:.3f} +- {result.perplexity * result.standard_error:.3f}"
    )
    return document, text


def _generation(loaded: LoadedNetwork, layout: Layout, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from bd3_scale.evaluation.generation import generate_texts, summary
    from bd3_scale.evaluation.judge import load_judge
    from bd3_scale.evaluation.page import ROWS, write_results
    from bd3_scale.generation.sampler import own_sampler

    judge = None if options.judge is None else load_judge(options.judge, loaded.device)
    sampling = {
        "length": options.length,
        **chosen(options),
        "sampler": options.sampler or own_sampler(loaded.objective),
        "stop_at_end_of_text": not options.ignore_eos,
        "use_cache": not options.no_cache,
    }
    texts = generate_texts(
        loaded,
        layout,
        samples=options.samples,
        batch=options.batch_size,
        seed=options.seed,
        judge=judge,
        progress=not options.json,
        **sampling,
    )
    document = {
        **_of_checkpoint(loaded, layout),
        "options": {**sampling, "seed": options.seed, "batch_size": options.batch_size},
        "judge": None if judge is None else judge.name,
        **summary(texts),
    }
    if layout.is_main_rank:
        write_results(options.output, texts, document, options.beside)
    lines = [f"{head}: {document[key]}" for key, head in ROWS.items() if document.get(key) is not None]
    return document, "\n".join([*lines, f"written: {options.output}"])


def _rows(loaded: LoadedNetwork, layout: Layout, options: argparse.Namespace) -> tuple[Rows, str]:
    """What is evaluated, and its name."""
    from bd3_scale.data.open import open_data
    from bd3_scale.data.preparation import zero_shot
    from bd3_scale.evaluation.likelihood import open_rows

    if (options.zero_shot is None) != (options.source is None) or (options.cache is not None and options.zero_shot is None):
        raise RecipeError("--zero-shot names a set and --source the file it lies in: give both, or neither and no --cache")
    if options.zero_shot is not None:
        if options.data is not None:
            raise RecipeError("--zero-shot and --data are two sets of rows; give one of them")
        name, cache = options.zero_shot, options.cache or zero_shot.CACHE
        context, special = loaded.recipe.model.context, loaded.recipe.data.row_special
        return zero_shot.zero_shot_rows(name, options.source, loaded.tokenizer, context=context, row_special=special, cache=cache), name
    if options.data is not None:
        return open_rows(options.data, options.split, loaded), str(options.data)
    if options.split != "validation":
        raise RecipeError(f"split is {options.split!r}, but of the checkpoint's own data only the held-out rows are in order; name --data")
    data = open_data(loaded.recipe.data, loaded.recipe.model.context, leader=layout.is_main_rank, barrier=layout.barrier)
    return data.validation, data.folder


COMMANDS = {"likelihood": _likelihood, "generation": _generation}


if __name__ == "__main__":
    run_program(main)
