"""`python -m bd3_scale.launch slurm|kubernetes RECIPE [key=value ...] --nodes 8 ...`: from a recipe to a job of a cluster.

The recipe is checked at the size of the job first, with the message that training would give; then a template of `launching/templates/` is
filled in and submitted (sbatch, kubectl apply), written (--write) or printed (--dry-run). What was done is said in one line.
Exit status: 0, 2 for a recipe or an option that cannot work, 1 where the scheduler refuses.
"""

from __future__ import annotations

import argparse
import sys

from bd3_scale.errors import UserError
from bd3_scale.launching import job as jobs
from bd3_scale.launching import kubernetes, slurm
from bd3_scale.program import run_program

TARGETS = ("slurm", "kubernetes")


def main(arguments: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    chooser = argparse.ArgumentParser(prog="bd3 launch", description="Start a run on a cluster.")
    chooser.add_argument("target", choices=TARGETS, help="`TARGET --help` lists what it takes")
    target = chooser.parse_args(words[:1]).target
    parser = argparse.ArgumentParser(prog=f"bd3 launch {target}", description=f"Start a run on {target}.")
    jobs.add_options(parser)
    module = slurm if target == "slurm" else kubernetes
    module.add_options(parser)
    options = parser.parse_intermixed_args(words[1:])
    try:
        said = _slurm(options) if target == "slurm" else _kubernetes(options)
    except UserError as error:
        return error.say()
    print(said, end="" if said.endswith("\n") else "\n")
    return 0


def _slurm(options: argparse.Namespace) -> str:
    job = jobs.read(options, slurm.PORT)
    text, logs = slurm.script(job, options)
    if options.dry_run:
        return text
    if options.write is not None:
        logs.mkdir(parents=True, exist_ok=True)  # sbatch does not make it, and the job would end without a word
        options.write.write_text(text)
        return f"{options.write}: {_size(job)}; submit it with `sbatch {options.write}`"
    return f"{slurm.submit(text, logs)}: {_size(job)}; its output goes to {logs}"


def _kubernetes(options: argparse.Namespace) -> str:
    job = jobs.read(options, kubernetes.PORT)
    text = kubernetes.manifest(job, options)
    if options.dry_run:
        return text
    if options.write is not None:
        options.write.write_text(text)
        return f"{options.write}: {_size(job)}; submit it with `kubectl apply -f {options.write}`"
    return f"{kubernetes.submit(text)}: {_size(job)}"


def _size(job: jobs.Job) -> str:
    return f"{job.recipe.total_steps} steps on {job.node_range} node(s) x {job.processes} process(es)"


if __name__ == "__main__":
    run_program(main)
