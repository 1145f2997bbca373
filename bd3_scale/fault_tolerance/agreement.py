"""What must be the same on all ranks is compared before the first step: a node with another recipe trains on without a word otherwise.

Every rank makes one digest of its facts: the resolved recipe without what may differ from host to host, the versions of the packages
that compute (and of this package its sources, since two working copies bear one version), later the fingerprints of data and tokenizer.
Only where digests differ are the facts themselves gathered, to name the first. Invariants: all ranks raise the same RecipeError, of one
line; a recipe is compared before groups are made of it, so that ranks of different layouts do not wait for each other; no credentials
are shown.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import bd3_scale
from bd3_scale.data.open import Data
from bd3_scale.distributed.rendezvous import ranks_text
from bd3_scale.errors import RecipeError, on_all_ranks, without_credentials
from bd3_scale.recipe import Recipe, flatten
from bd3_scale.recipe.text import as_yaml

HOST_LOCAL = {"data.path", "data.remote", "data.cache_bytes", "data.download_ahead", "data.prefetch", "data.tokenizer", "run.threads"}
"""Keys that may differ: where a host finds data and tokenizer (their fingerprints may not) and how it reads them."""
PACKAGES = ("torch", "deepspeed", "megatron-core")
SAME_RECIPE = "start all nodes with the same recipe and overrides"
SAME_DATA = "let it name the same data on all nodes"

Gather = Callable[[Any], list[Any]]
"""A value of every rank, in rank order, on every rank."""


def recipe_and_versions(recipe: Recipe, device: str) -> dict[str, Any]:
    """Facts that are known before any data is read."""
    facts = {key: value for key, value in flatten(recipe).items() if key not in HOST_LOCAL}
    facts["data.mixture"] = [source.weight for source in recipe.data.mixture]
    facts["run.device"] = device
    facts |= {f"version of {package}": _version(package) for package in PACKAGES}
    return facts | {"version of bd3_scale": f"{bd3_scale.__version__} (sources {_sources()})"}


def data_and_tokenizer(data: Data) -> dict[str, Any]:
    """Facts of what was opened."""
    return {"data.path": f"data {data.fingerprint[:16]}", "data.tokenizer": f"tokenizer {data.tokenizer.fingerprint[:16]}"}


def agree(facts: Mapping[str, Any], gather: Gather) -> None:
    """Compare the facts of all ranks; collective. Raises RecipeError, the same everywhere, that names the first that differs and where."""
    texts = {key: json.dumps(value, default=str) for key, value in facts.items()}
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    answers: list[tuple[str, dict[str, str]]] = gather((socket.gethostname(), texts))
    hosts = [host for host, _ in answers]
    for key in dict.fromkeys(key for _, rank_texts in answers for key in rank_texts):
        values = [rank_texts.get(key, '"absent"') for _, rank_texts in answers]
        if len(set(values)) > 1:
            usual = Counter(values).most_common(1)[0][0]  # of as many that of the lowest rank
            other = next(value for value in values if value != usual)
            shown = [
                f"{as_yaml(without_credentials(json.loads(value)))} on {_where([r for r, v in enumerate(values) if v == value], hosts)}"
                for value in (other, usual)
            ]
            cure = f"install the same {key.split()[-1]} everywhere" if key.startswith("version") else SAME_RECIPE
            with on_all_ranks():
                raise RecipeError(f"{key} is {shown[0]} but {shown[1]}; {SAME_DATA if key in HOST_LOCAL else cure}")


def _where(ranks: list[int], hosts: list[str]) -> str:
    found = [(host, list(group)) for host, group in groupby(ranks, key=lambda rank: hosts[rank])]
    named = [f"{ranks_text(group)} (host {host})" for host, group in found[:4]]
    return f"{', '.join(named)}{', ...' if found[4:] else ''}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _sources() -> str:
    """A digest of this package's own code."""
    root, digest = Path(bd3_scale.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]
