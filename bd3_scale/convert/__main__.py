"""Weights from elsewhere into a checkpoint, a checkpoint into what others read, several into one; tensor by tensor.

    # GPT-2, Llama, Mistral, Qwen2, Qwen3, SmolLM3 (a Hugging Face directory) as the start of block diffusion on your data; LLaDA and
    # Dream go on as masked diffusion, or with --objective bd3
    bd3 convert import ~/gpt2 runs/from-gpt2 --data data/my-corpus --block-size 16
    bd3 train runs/from-gpt2/recipe.yaml
    # a run that goes on with longer rows
    bd3 convert import owt_1b.safetensors runs/owt_1b_32k --data data/long-gpt2-32768 --recipe owt_1b_32k
    # the paper's published weights (a Hugging Face directory, or a Lightning .ckpt), to sample from
    bd3 convert import ~/bd3lm-owt-block_size4 runs/paper-4
    # a checkpoint or a run for others: a Hugging Face directory with modelling code, or one safetensors file
    bd3 convert export runs/quickstart my-model
    bd3 convert export runs/quickstart my-model.safetensors --weights weight
    # for SGLang and LMDeploy, a network in the shape of Qwen3 with its tokenizer
    bd3 convert export runs/from-qwen3 my-served --format sdar
    # the mean of the last five checkpoints of a run, to sample, evaluate or export
    bd3 convert average runs/quickstart runs/averaged --last 5
    # a run that goes on in a program of one's own under DeepSpeed
    bd3 convert export runs/quickstart my-universal --deepspeed

Exit status 0, or 1 (2 for the recipe's keys) with one line that says what is wrong. Nothing that exists is overwritten.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bd3_scale.errors import RecipeError, UserError
from bd3_scale.messages import show
from bd3_scale.program import run_program


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bd3 convert", description="Convert checkpoints from and to other formats.")
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("import", help="make one of our checkpoints")
    take.add_argument(
        "source", type=Path, help="a Hugging Face directory, a DeepSpeed universal checkpoint, an exported .safetensors file, a .ckpt file"
    )
    take.add_argument("out", type=Path, help="new run directory")
    take.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", help="keys of the recipe that goes on from it")
    take.add_argument(
        "--recipe", metavar="NAME", help="a recipe, by path or by name, from which all is taken that is not the network: fine_tune"
    )
    take.add_argument("--tokenizer", help="gpt2 | bytes | a `tokenizers` JSON file; default: the source's own")
    take.add_argument("--config", type=Path, metavar="FILE", help="the model's config.json, where it does not lie beside the weights")
    take.add_argument("--data", metavar="FOLDER", help="prepared data to train on: makes a run that bd3 train continues")
    take.add_argument("--objective", help="bd3 | mdlm | sedd | ssdlm | ar; default: the source's; of causal language models bd3")
    take.add_argument("--block-size", type=int, metavar="L'", help="the block size of bd3; default: the source's, or the recipe's default")
    give = commands.add_parser("export", help="write one of our checkpoints for others")
    give.add_argument("checkpoint", help="a checkpoint folder, or a run directory (its latest is taken)")
    give.add_argument("out", type=Path, help="a new FILE.safetensors, or a new folder for a Hugging Face directory")
    give.add_argument(
        "--deepspeed", action="store_true", help="a universal checkpoint of DeepSpeed (weights and moments) instead, to go on from there"
    )
    give.add_argument(
        "--format", choices=("sdar",), help="sdar: a directory that SGLang and LMDeploy serve, a network in the shape of Qwen3"
    )
    give.add_argument("--weights", default="auto", help="auto | ema | weight; auto takes the averaged weights where there are any")
    mean = commands.add_parser("average", help="make one checkpoint of the last ones of a run")
    mean.add_argument("run", type=Path, help="a run directory, or the newest checkpoint that counts")
    mean.add_argument("out", type=Path, help="new run directory")
    mean.add_argument("--last", type=int, default=5, metavar="K", help="how many, up to the latest; default 5")
    mean.add_argument("--by", default="uniform", help="uniform | step: a checkpoint counts as its step")
    mean.add_argument("--weights", default="weight", help="weight | ema: the trained weights, or their averages, again averaged")
    return parser


def _import(options: argparse.Namespace) -> None:
    from bd3_scale.convert.detect import detect
    from bd3_scale.convert.write import under, write

    found, tokenizer = detect(
        options.source,
        tokenizer=options.tokenizer,
        objective=options.objective,
        block_size=options.block_size,
        config_file=options.config,
    )
    if options.recipe is not None:
        found = under(found, options.recipe, options.block_size)
    written = write(found, options.out, tokenizer=tokenizer, data=options.data, overrides=options.set)
    recipe = written.recipe
    masks = {rule.mask for rule in found.key_map.whole if rule.rows == "vocabulary"}
    print(f"{found.origin}: {recipe.model.layers} layers x {recipe.model.hidden}, context {recipe.model.context} -> {written.checkpoint}")
    if masks:
        (row,) = masks
        print(f"MASK is a new last id; its row is {'the mean of those that text has' if row is None else f'their row {row}, their MASK'}")
    if found.note:
        print(found.note)
    if found.origin.endswith("(Hugging Face)"):
        print(f"rows of {recipe.model.context} tokens (--set model.context=N for others); the objective goes on as {recipe.objective.kind}")
    if written.trainable:
        print(f"train from it: bd3 train {written.recipe_file}")
    else:
        print(f"sample from it: bd3 sample {options.out}")
        print("to train from it, prepare data with its tokenizer (bd3 prepare) and convert again with --data FOLDER")


def _export(options: argparse.Namespace) -> None:
    from bd3_scale.convert import export, sdar

    if options.deepspeed and options.format:
        raise RecipeError(f"--deepspeed and --format {options.format} are two forms; leave one of them out")
    if options.deepspeed:
        written = export.universal(options.checkpoint, options.out)
    elif options.format == "sdar":
        written = sdar.directory(options.checkpoint, options.out, weights=options.weights)
    else:
        write = export.single_file if options.out.suffix == ".safetensors" else export.directory
        written = write(options.checkpoint, options.out, weights=options.weights)
    print(f"{written.kind} of {written.checkpoint} -> {options.out} ({written.parameters:,} parameters)")


def _average(options: argparse.Namespace) -> None:
    from bd3_scale.convert.average import average

    made = average(options.run, options.out, last=options.last, by=options.by, weights=options.weights)
    print(f"the mean of steps {', '.join(map(str, made.steps))} -> {made.checkpoint}")
    print(f"sample from it: bd3 sample {options.out}")


COMMANDS = {"import": _import, "export": _export, "average": _average}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    show()
    try:
        COMMANDS[options.command](options)
    except UserError as error:
        return error.say("bd3 convert")
    return 0


if __name__ == "__main__":
    run_program(main)
