"""A SLURM batch script from `templates/slurm/train.sbatch`, and its submission by sbatch.

Invariants: all of the site - partition, account, limits, modules, containers - comes from options; an `--sbatch-option` of a name that
is set here takes its place.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from bd3_scale.errors import RecipeError, TrainingError
from bd3_scale.launching.job import Job
from bd3_scale.launching.node import UNFINISHED
from bd3_scale.launching.rendering import Raw, render

PORT = 29400
OPTION = re.compile(r"[a-z][a-z0-9-]*")
GPU_OPTIONS = {"gpus-per-node", "gpus", "gpus-per-task", "gres"}
"""Where one of them is given by hand, the number of GPUs is not said twice."""


def add_options(parser: argparse.ArgumentParser) -> None:
    site = parser.add_argument_group("site")
    site.add_argument("--partition", help="of the cluster")
    site.add_argument("--account", help="that pays")
    site.add_argument("--qos", help="quality of service")
    site.add_argument("--time", metavar="LIMIT", help="of one attempt, as sbatch takes it (1-00:00:00); the job then queues again")
    site.add_argument("--sbatch-option", action="append", default=[], metavar="NAME[=VALUE]", help="any other; repeatable")
    site.add_argument("--srun-option", action="append", default=[], metavar="NAME[=VALUE]", help="container-image=..., repeatable")
    site.add_argument("--setup", action="append", default=[], metavar="LINE", help="a line of bash before the start (module load ...)")
    site.add_argument("--python", default=sys.executable, metavar="PROGRAM", help="on the nodes (default: the one that runs this)")
    site.add_argument("--logs", type=Path, metavar="DIR", help="of the job and of each rank (default: run.dir with -logs after it)")


def script(job: Job, options: argparse.Namespace) -> tuple[str, Path]:
    """The batch script, and the folder of its logs, which must exist before it is submitted."""
    here = Path.cwd()
    run_dir = here / job.recipe.run.dir
    logs = here / (options.logs or f"{run_dir}-logs")
    elastic = job.least_nodes < job.nodes
    srun_options = [] if options.cpus_per_node is None else [f"--cpus-per-task={options.cpus_per_node}"]  # not taken from the job
    srun_options += ["--no-kill"] if elastic else []
    srun_options += [f"--{name}" if value is None else f"--{name}={value}" for name, value in _named(options, "srun_option")]
    values = {
        "directives": [(key, directive(value)) for key, value in sorted(_directives(job, options, here, logs).items())],
        "setup": options.setup,
        "environment": job.environment,
        "logs": str(logs),
        "run_dir": str(run_dir),
        "python": options.python,
        "srun_options": srun_options,
        "least": Raw(f"{job.least_nodes}:" if elastic else ""),
        "processes": job.processes,
        "restarts": job.restarts,
        "wait": job.wait,
        "port": job.port,
        "rendezvous": job.rendezvous,
        "recipe": str(job.path),
        "overrides": job.overrides,
        "unfinished": UNFINISHED,
    }
    return render("slurm/train.sbatch", values), logs


def _directives(job: Job, options: argparse.Namespace, here: Path, logs: Path) -> dict[str, str | None]:
    by_hand = dict(_named(options, "sbatch_option"))
    found: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": job.node_range.replace(":", "-"),
        "ntasks-per-node": "1",
        "chdir": str(here),
        "output": f"{str(logs).replace('%', '%%')}/%j.out",
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{job.grace}",
    }
    if job.least_nodes < job.nodes:
        found["no-kill"] = None
    if job.gpus and not GPU_OPTIONS & by_hand.keys():
        found["gpus-per-node"] = str(job.gpus)
    for name, value in (
        ("cpus-per-task", options.cpus_per_node), ("mem", options.memory_per_node), ("partition", options.partition),
        ("account", options.account), ("qos", options.qos), ("time", options.time),
    ):  # fmt: skip
        if value is not None:
            found[name] = str(value)
    return found | by_hand


def directive(value: str | None) -> Raw | None:
    """A value as sbatch reads it: quotes as in a shell, but a backslash also counts between them."""
    return None if value is None else Raw(shlex.quote(value.replace("\\", "\\\\")))


def _named(options: argparse.Namespace, key: str) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for item in getattr(options, key):
        name, sign, value = item.removeprefix("--").partition("=")
        if not OPTION.fullmatch(name):
            raise RecipeError(f"--{key.replace('_', '-')} {item!r} must be NAME or NAME=VALUE, a long option without its dashes")
        found.append((name, value if sign else None))
    return found


def submit(text: str, logs: Path) -> str:
    """Hand the script to sbatch; what it answered. Raises TrainingError."""
    logs.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise TrainingError("sbatch is not on this machine; use --write FILE here and submit the file where SLURM is") from None
    if done.returncode != 0:
        raise TrainingError(f"sbatch refused the job: {' '.join(done.stderr.split())}; nothing was submitted")
    return done.stdout.strip()
