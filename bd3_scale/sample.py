"""`python -m bd3_scale.sample CHECKPOINT [--prompt TEXT ...]`: text from any checkpoint, for people or as JSON; with `--prompts-file` for
thousands of prompts, as JSON lines that a killed command goes on with.

Under torchrun all processes become one tensor-parallel group: each holds its part of the weights and of the cache, all run
the same sampler on the same logits, and the first speaks and writes. A checkpoint of any layout is sampled by any number of
processes that divides its heads and hidden units.

Exit status: 0 when the texts are written, 2 for options that cannot work, 1 for a checkpoint or tokenizer that cannot be
used. Errors are one line each. The same seed and options give the same texts, with the cache or without, by one process or
by many: their logits differ by rounding, which changes a token only where the two best of a draw tie within it. In fp32
that does not happen in practice; in bf16 texts may part after some hundred tokens. The ranks of one group never part:
their logits are gathered, so they have the same bits, and their inputs and their texts are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bd3_scale.cli import CommandParser, end_with, own_world, rank_and_size
from bd3_scale.errors import RecipeError, UserError
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.prompts_file import SLOTS, generate_file, read_prompts
from bd3_scale.generation.sampler import ENTROPY_WINDOW, Result, own_sampler
from bd3_scale.generation.token_sampling import DEFAULT_THRESHOLD, SAMPLERS, SamplingOptions
from bd3_scale.messages import show
from bd3_scale.program import run_program

if TYPE_CHECKING:
    from bd3_scale.generation.load_model import LoadedNetwork


class _Parser(CommandParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith("required: checkpoint"):
            message = (
                "no checkpoint is named; name it first (CHECKPOINT --prompt TEXT), because all words that follow --prompt are texts, "
                "or put -- before it"
            )
        super().error(message)


def _parser() -> _Parser:
    parser = _Parser(prog="bd3 sample", description="Text from a checkpoint.")
    add = parser.add_argument
    add("checkpoint", help="a checkpoint folder, or a run directory (its latest checkpoint)")
    add("--prompt", nargs="+", action="extend", metavar="TEXT", help="what the texts begin with; several give several texts")
    add("--prompts-file", type=Path, metavar="FILE", help="a prompt a line (.jsonl: a string, or an object with prompt); needs --output")
    add("--chat", nargs="+", action="extend", metavar="TEXT", help="instead: what a user says, given in the tokenizer's chat template")
    add("--system", metavar="TEXT", help="with --chat: the system's message before it")
    add("--length", type=int, help="tokens per text, with its beginning and the prompt; default: the training context; may exceed it")
    add(
        "--batch-size",
        type=int,
        metavar="B",
        help=f"texts made together; a multiple of the prompts; default: one per prompt; of a file {SLOTS}",
    )
    add_sampler_options(parser)
    add("--block-size", type=int, metavar="L'", help="of a network trained with several block sizes: which; default: the most frequent")
    add("--weights", default="auto", help="auto | ema | weight; auto takes the averaged weights where there are any")
    add("--device", default="auto", help="auto | cpu | cuda")
    add("--json", action="store_true", help="print one JSON document")
    add(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="also write one JSON line per text, to a new file; of a prompts file: go on with it",
    )
    return parser


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen and where texts end: the options of all commands that make texts."""
    add = parser.add_argument
    add("--sampler", help=f"{' | '.join(SAMPLERS)}; default first_hitting, one token per network call; of ssdlm simplex")
    add("--steps", type=int, metavar="T", help="ancestral, remasking, analytic, euler, simplex: steps per block; default: the block size")
    add("--threshold", type=float, metavar="C", help=f"confidence: reveal what is more probable than this; default {DEFAULT_THRESHOLD}")
    add("--corrections", type=int, metavar="C", help="remasking: further calls per block that draw its least sure tokens anew; default: T")
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus: the smallest set of tokens whose mass reaches P")
    add("--nucleus", default="keep", help="keep | strict: drop the token that crosses P, as the paper's code does")
    add("--temperature", type=float, default=1.0, metavar="X", help="divides the logits; 0 takes the most probable token")
    add(
        "--minimum-entropy",
        type=float,
        metavar="H",
        help=f"end a text whose last {ENTROPY_WINDOW} tokens have less entropy (nats; the paper: 4)",
    )
    add("--ignore-eos", action="store_true", help="go on after an end of text, to the full length")
    add("--seed", type=int, default=0)
    add("--no-cache", action="store_true", help="recompute everything in every network call (same texts, slower)")


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_sampler_options` say of how tokens are chosen: the arguments of `SamplingOptions`."""
    return {item.name: getattr(options, item.name) for item in fields(SamplingOptions)}


def main(argv: list[str] | None = None) -> int:
    show()
    try:
        options = _parser().parse_args(argv)
        if (
            options.output is not None
            and options.prompts_file is None
            and rank_and_size()[0] == 0
            and (options.output.exists() or not options.output.absolute().parent.is_dir())
        ):
            raise RecipeError(f"--output {options.output} exists already or lies in no folder; name a new file in a folder that exists")
        if options.prompts_file is None:
            _run(options)
        else:
            _run_file(options)
    except UserError as error:
        return end_with(error)
    return 0


def _run_file(options: argparse.Namespace) -> None:
    if options.prompt is not None or options.chat is not None or options.json or options.output is None:
        raise RecipeError("--prompts-file takes --output FILE.jsonl, and neither --prompt, --chat nor --json")
    SamplingOptions(**chosen(options))
    prompts = read_prompts(options.prompts_file)
    with _network(options, cure="start the same command again, it goes on") as loaded:
        made = generate_file(
            loaded,
            prompts,
            options.output,
            slots=SLOTS if options.batch_size is None else options.batch_size,
            length=options.length,
            seed=options.seed,
            stop_at_end_of_text=not options.ignore_eos,
            use_cache=not options.no_cache,
            progress=True,
            **chosen(options),
        )
    if rank_and_size()[0] == 0:
        print(f"{made.texts} texts in {options.output}, {made.before} of which were there")


def _run(options: argparse.Namespace) -> None:
    if (options.chat and options.prompt) or (options.system is not None and not options.chat):
        raise RecipeError("--prompt goes with neither --chat nor --system, and --system only with --chat; leave one of them out")
    SamplingOptions(**chosen(options))  # what is wrong is known before a large network is loaded
    with _network(options, cure="start the same command again, nothing was written") as loaded:
        options.sampler = options.sampler or own_sampler(loaded.objective)
        result = generate_tokens(
            loaded,
            prompts=_chats(loaded, options) if options.chat else options.prompt,
            batch=options.batch_size,
            length=options.length,
            seed=options.seed,
            stop_at_end_of_text=not options.ignore_eos,
            use_cache=not options.no_cache,
            **chosen(options),
        )
    if rank_and_size()[0] == 0:
        _report(loaded, options, result)


@contextmanager
def _network(options: argparse.Namespace, cure: str) -> Iterator[LoadedNetwork]:
    """The network of the checkpoint, in the world of this command, whose ranks look after each other. `cure`: for when one is lost."""
    with own_world():
        from bd3_scale.fault_tolerance.rank_monitor import RankMonitor
        from bd3_scale.generation.load_model import load_network

        loaded = load_network(options.checkpoint, weights=options.weights, device=options.device, block_size=options.block_size)
        with RankMonitor(*rank_and_size(), loaded.recipe.parallel.heartbeat, cure=cure):
            yield loaded


def _chats(loaded: LoadedNetwork, options: argparse.Namespace) -> list[list[int]]:
    """The prompts of the conversations that are asked for."""
    from bd3_scale.data.chat import ChatTemplate

    template = ChatTemplate(loaded.tokenizer)
    before = [] if options.system is None else [{"role": "system", "content": options.system}]
    return loaded.tokenizer.encode_chat([template.prompt([*before, {"role": "user", "content": text}]) for text in options.chat])


def _report(loaded: LoadedNetwork, options: argparse.Namespace, result: Result) -> None:
    """Write the file, print the document or the texts."""
    texts = _texts(loaded, result)
    if options.output is not None:
        _write(options.output, texts)
    if options.json:
        print(json.dumps(_document(loaded, options, result, texts), indent=1))
        return
    for place, text in enumerate(texts):
        print(f"--- text {place + 1} of {len(texts)}\n{text['answer'] if options.chat else text['text']}")
        print(
            f"[{len(text['tokens'])} tokens, {text['prompt_tokens']} given; stop: {text['stop']}; "
            f"NFE {result.nfe}, {_speed(result):.1f} tokens/s for all texts]"
        )


def _texts(loaded: LoadedNetwork, result: Result) -> list[dict[str, Any]]:
    """One entry per row. `text` leaves out the BOS; `tokens` and `prompt_tokens` have it; `answer` is what is behind the prompt, without an
    end of text."""
    return [
        {
            "row": row,
            "text": loaded.tokenizer.decode(tokens[1:].tolist()),
            "answer": loaded.tokenizer.decode([token for token in tokens[prompt:].tolist() if token != loaded.tokenizer.end_of_text]),
            "stop": stop,
            "prompt_tokens": prompt,
            "tokens": tokens.tolist(),
        }
        for row, (tokens, prompt, stop) in enumerate(zip(result.tokens, result.prompt_lengths, result.stops, strict=True))
    ]


def _document(loaded: LoadedNetwork, options: argparse.Namespace, result: Result, texts: list[dict[str, Any]]) -> dict[str, Any]:
    asked = {key: value for key, value in vars(options).items() if key not in ("checkpoint", "output", "json", "prompts_file")}
    return {
        "checkpoint": str(loaded.checkpoint.path),
        "step": loaded.checkpoint.step,
        "weights": loaded.weights,
        "device": str(loaded.device),
        "processes": loaded.peers.world_size,
        "options": asked,
        "nfe": result.nfe,
        "seconds": result.seconds,
        "tokens_per_second": _speed(result),
        "texts": texts,
    }


def _speed(result: Result) -> float:
    return result.generated / max(result.seconds, 1e-9)


def _write(path: Path, texts: list[dict[str, Any]]) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(text) + "\n" for text in texts)
    except OSError as error:
        raise RecipeError(f"--output {path} cannot be written ({error.strerror}); name another file") from None


if __name__ == "__main__":
    run_program(main)
