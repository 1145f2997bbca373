"""What is launched, whatever launches it: a recipe that works at every size that the job may have, and the words that start it.

Invariants: a recipe is refused here with the message that training would give, before anything is written or submitted; what a
user wrote is one line of printable characters, or it is refused (no scheduler's file can hold another).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from bd3_scale import recipe as recipes
from bd3_scale.errors import RecipeError
from bd3_scale.files import expanded
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import DataConfig
from bd3_scale.rules.validate import validate

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    path: Path
    overrides: list[str]
    name: str
    least_nodes: int
    nodes: int
    processes: int
    """Per node."""
    gpus: int
    """Per node; 0: CPU."""
    restarts: int
    port: int
    grace: int
    """Seconds for saving after the stop was asked for."""
    wait: int
    """Seconds for which nodes wait for each other."""
    environment: list[tuple[str, str]]

    @property
    def node_range(self) -> str:
        return str(self.nodes) if self.least_nodes == self.nodes else f"{self.least_nodes}:{self.nodes}"

    @property
    def rendezvous(self) -> str:
        """torchrun's --rdzv-conf."""
        return f"join_timeout={self.wait},read_timeout={self.wait}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all targets share."""
    parser.add_argument("recipe", help="a YAML file, for example recipes/owt_1b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example training.steps=100")
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", default="1", metavar="N | LEAST:MOST", help="nodes; with LEAST:MOST the job goes on with fewer (elastic)")
    size.add_argument("--gpus-per-node", type=_count(0), default=8, metavar="N", help="0: a job on CPUs (default: 8)")
    size.add_argument("--processes-per-node", type=_count(1), metavar="N", help="ranks a node (default: one a GPU)")
    size.add_argument("--cpus-per-node", type=_count(1), metavar="N", help="CPU cores a node (default: what the site gives)")
    size.add_argument("--memory-per-node", metavar="AMOUNT", help="host memory a node, as the scheduler writes it: 900G, 900Gi")
    run = parser.add_argument_group("run")
    run.add_argument("--name", help="of the job (default: the recipe's run.name)")
    run.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="a variable of all processes; repeatable")
    run.add_argument("--data-cache", metavar="DIR", help="node-local copy of the shards: data.path is a folder in it")
    run.add_argument("--restarts", type=_count(0), default=3, metavar="N", help="failures in place, by torchrun (default: 3)")
    run.add_argument("--grace", type=_count(1), default=120, metavar="SECONDS", help="for saving when the job is to end (default: 120)")
    run.add_argument("--wait", type=_count(1), default=1800, metavar="SECONDS", help="nodes wait so long for each other (default: 1800)")
    run.add_argument("--port", type=_count(1), metavar="N", help="where the ranks meet on the first node")
    todo = parser.add_mutually_exclusive_group()
    todo.add_argument("--dry-run", action="store_true", help="print what would be submitted, and nothing else")
    todo.add_argument("--write", type=Path, metavar="FILE", help="write the file and do not submit it")


def read(options: argparse.Namespace, default_port: int) -> Job:
    """Check what was asked for. Raises RecipeError."""
    for key, value in vars(options).items():
        for one in value if isinstance(value, list) else [value]:
            # Lines of shell code of the site (--setup) may hold tabs, for example.
            if isinstance(one, (str, Path)) and not str(one).replace("\t", " ").isprintable():
                raise RecipeError(f"{_option(key)} {str(one)!r} holds a line break or an unprintable character; leave it out")
    least, most = _nodes(options.nodes)
    processes = options.processes_per_node or options.gpus_per_node or 1
    if options.gpus_per_node and processes > options.gpus_per_node:
        raise RecipeError(f"--processes-per-node {processes} is above --gpus-per-node {options.gpus_per_node}, but each rank needs a GPU")
    overrides = list(options.overrides)
    recipe = recipes.load(options.recipe, overrides)
    if options.data_cache is not None:
        overrides += _cached(recipe.data, options.data_cache)
        recipe = recipes.load(options.recipe, overrides)
    device = "cuda" if options.gpus_per_node else "cpu"
    validate(recipe, most * processes, device)
    for nodes in range(least, most):
        try:
            validate(recipe, nodes * processes, device)
        except RecipeError as error:
            raise RecipeError(f"--nodes {options.nodes}, at {nodes} node(s): {error}; or set --nodes {most}") from None
    return Job(
        recipe=recipe,
        path=Path(options.recipe).absolute(),
        overrides=overrides,
        name=options.name or recipe.run.name,
        least_nodes=least,
        nodes=most,
        processes=processes,
        gpus=options.gpus_per_node,
        restarts=options.restarts,
        port=options.port or default_port,
        grace=options.grace,
        wait=options.wait,
        environment=[_variable(item) for item in options.env],
    )


def _cached(data: DataConfig, cache: str) -> list[str]:
    """The overrides that let each node keep its own copy of the shards it needs."""
    if data.mixture:
        raise RecipeError("--data-cache does not know where sources of data.mixture go; set path and remote of each in the recipe")
    if data.source is not None:
        raise RecipeError(f"--data-cache copies prepared data, but data.source={data.source} prepares them; leave --data-cache out")
    remote = data.remote
    if remote is None:
        remote = str(expanded(data.path))
    return [f"data.remote={remote}", f"data.path={cache.rstrip('/')}/{Path(data.path).name}"]


def _nodes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    least, most = (int(match[1] or match[2]), int(match[2])) if match else (0, 0)
    if not 1 <= least <= most:
        raise RecipeError(f"--nodes {text} must be a number above 0, or two as LEAST:MOST; set --nodes 8, or --nodes 4:8")
    return least, most


def _variable(item: str) -> tuple[str, str]:
    key, sign, value = item.partition("=")
    if not sign or not VARIABLE.fullmatch(key):
        raise RecipeError(f"--env {item!r} must have the form KEY=VALUE with a KEY of letters, digits and _")
    return key, value


def _option(key: str) -> str:
    return key if key in ("recipe", "overrides") else f"--{key.replace('_', '-')}"


def _count(least: int) -> type:
    """An argparse type: a whole number that is not below `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, {least} or above")
        return int(text)

    return number  # type: ignore[return-value]
