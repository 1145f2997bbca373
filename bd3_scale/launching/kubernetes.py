"""Kubernetes manifests from `templates/kubernetes/`: an indexed Job, a PyTorchJob or a TrainJob, and their submission by kubectl.

Invariants: all of the site - image, namespace, claims, secrets, placement - comes from options; the recipe travels in a ConfigMap;
all nodes of a run share its directory (a claim), because checkpoints are written by all ranks into one folder and all pods read from
its heartbeat whether the run is finished.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import PurePosixPath
from typing import Any

from bd3_scale.errors import RecipeError, TrainingError
from bd3_scale.launching.job import VARIABLE, Job
from bd3_scale.launching.node import UNFINISHED
from bd3_scale.launching.rendering import render

PORT = 29400
KINDS = {"job": "trainer", "pytorchjob": "pytorch", "trainjob": "node"}
"""Kinds of job, and the container's name that each asks for."""
NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
"""Of a Service, and short enough for names of pods made from it."""
RECIPE_FOLDER = "/etc/bd3_scale"
STARTED = "/tmp/bd3_scale.started"
LARGEST_RECIPE = 900_000
"""Bytes; a ConfigMap holds a mebibyte."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=sorted(KINDS), default="job", help="job needs no operator (default); others are Kubeflow's")
    parser.add_argument("--image", required=True, help="that holds bd3_scale (cluster/docker/Dockerfile makes one)")
    site = parser.add_argument_group("site")
    site.add_argument("--namespace", default="default")
    site.add_argument("--claim", metavar="NAME", help="PersistentVolumeClaim of the working folder; of many nodes: ReadWriteMany")
    site.add_argument("--mount", default="/mnt/bd3_scale", metavar="DIR", help="where relative paths of the recipe begin; of the claim")
    site.add_argument("--remote", metavar="URL", help="s3://bucket/folder: copies of checkpoints go there (checkpoint.remote)")
    site.add_argument("--secret", action="append", default=[], metavar="VARIABLE=SECRET[/KEY]", help="from a Secret; repeatable")
    site.add_argument("--gpu-resource", default="nvidia.com/gpu", metavar="NAME")
    site.add_argument("--resource", action="append", default=[], metavar="NAME=AMOUNT", help="any other a node: rdma/ib=8; repeatable")
    site.add_argument("--shared-memory", default="16Gi", metavar="AMOUNT", help="/dev/shm of a pod")
    site.add_argument("--node-selector", action="append", default=[], metavar="LABEL=VALUE", help="repeatable")
    site.add_argument("--toleration", action="append", default=[], metavar="KEY[:EFFECT]", help="repeatable")
    site.add_argument("--service-account", metavar="NAME")
    site.add_argument("--priority-class", metavar="NAME")
    site.add_argument("--pull-secret", metavar="NAME")
    site.add_argument("--patience", type=int, default=30, metavar="MINUTES", help="without a sign of life (default: 30)")
    site.add_argument("--runtime", default="torch-distributed", metavar="NAME", help="ClusterTrainingRuntime of a trainjob")


def manifest(job: Job, options: argparse.Namespace) -> str:
    """The YAML documents of a job. Raises RecipeError for what Kubernetes, or this kind of job, would not take."""
    kind = options.kind
    name = _name(job, options.name)
    _refuse(job, options)
    text = job.path.read_text()
    if len(text.encode()) > LARGEST_RECIPE:
        raise RecipeError(f"recipe {job.path} has more than {LARGEST_RECIPE} bytes, which no ConfigMap holds; shorten it")
    values: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "config_map": f"{name}-recipe",
        "container": KINDS[kind],
        "command": ["python", "-m", "bd3_scale.launching.node"],
        "arguments": _arguments(job, options, name),
        "environment": [(key, literal(value)) for key, value in job.environment],
        "secrets": [_secret(item) for item in options.secret],
        "resources": _resources(job, options),
        "alive": _alive(job, options),
        "recipe_text": text,
        "recipe_folder": RECIPE_FOLDER,
        "node_selector": [_pair(item, "--node-selector") for item in options.node_selector],
        "tolerations": [item.partition(":")[::2] for item in options.toleration],
        "backoff_limit": (job.restarts + 1) * job.nodes,
        "unfinished": UNFINISHED,
    }
    for key in ("least_nodes", "nodes", "processes", "restarts", "port", "grace"):
        values[key] = getattr(job, key)
    for key in (
        "namespace", "image", "claim", "mount", "data_cache", "shared_memory",
        "service_account", "priority_class", "pull_secret", "runtime",
    ):  # fmt: skip
        values[key] = getattr(options, key)
    return render(f"kubernetes/{kind}.yaml", values)


def _arguments(job: Job, options: argparse.Namespace, name: str) -> list[str]:
    size = ["--nnodes", job.node_range, "--nproc-per-node", str(job.processes)]
    meet = ["--max-restarts", str(job.restarts), "--rdzv-backend", "c10d", "--rdzv-id", name, "--rdzv-endpoint"]
    meeting = {
        "job": [*size, *meet, f"{name}-0.{name}:{job.port}"],
        "pytorchjob": [],  # its operator sets all of this in torchrun's environment
        "trainjob": [*meet, "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"],  # its operator sets the size
    }[options.kind]
    overrides = [*job.overrides]
    if options.remote is not None:
        overrides.append(f"checkpoint.remote={options.remote.rstrip('/')}/{name}")
    return [
        *("--directory", literal(options.mount), "--run-dir", literal(job.recipe.run.dir), "--wait", str(job.wait), "--started", STARTED),
        *("--", *meeting, "--rdzv-conf", job.rendezvous),
        *("-m", "bd3_scale.train", f"{RECIPE_FOLDER}/recipe.yaml", *map(literal, overrides)),
    ]


def literal(text: str) -> str:
    """Kubernetes expands $(NAME) in words of a container; doubled, it stays what it is."""
    return text.replace("$(", "$$(")


def _refuse(job: Job, options: argparse.Namespace) -> None:
    if options.kind == "trainjob" and (job.least_nodes < job.nodes or options.priority_class is not None):
        what = f"--nodes {job.node_range}" if job.least_nodes < job.nodes else "--priority-class"
        raise RecipeError(f"{what} cannot be said in a TrainJob; set --kind job or --kind pytorchjob, or leave it to the runtime")
    if job.nodes > 1 and options.claim is None:
        raise RecipeError("--claim is not set, but the nodes of a run share its directory; name a PersistentVolumeClaim (ReadWriteMany)")
    if options.claim is None and options.remote is None and job.recipe.checkpoint.remote is None:
        raise RecipeError("neither --claim nor --remote is set, so that checkpoints would go with the pod; set one of them")
    folder = PurePosixPath(options.mount) / job.recipe.run.dir
    if not options.mount.startswith("/") or not folder.is_relative_to(options.mount) or ".." in folder.parts:
        raise RecipeError(
            f"run.dir={job.recipe.run.dir} is not inside --mount {options.mount} and would go with the pod; set a relative one"
        )
    if options.data_cache is not None and not options.data_cache.startswith("/"):
        raise RecipeError(f"--data-cache {options.data_cache} must be an absolute path: it is mounted there")


def _name(job: Job, asked: str | None) -> str:
    """A name that Kubernetes takes: as asked for, or made of the recipe's."""
    name = asked or re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    if not NAME.fullmatch(name):
        raise RecipeError(f"the name {name!r} must be at most 52 small letters, digits and dashes, a letter first; set --name")
    return name


def _resources(job: Job, options: argparse.Namespace) -> list[tuple[str, str]]:
    found = [(options.gpu_resource, str(job.gpus))] if job.gpus else []
    found += [("cpu", str(options.cpus_per_node))] if options.cpus_per_node else []
    found += [("memory", options.memory_per_node)] if options.memory_per_node else []
    found += [_pair(item, "--resource") for item in options.resource]
    if not found:
        raise RecipeError("a job on CPUs must say what it needs of a node; set --cpus-per-node and --memory-per-node")
    return found


def _alive(job: Job, options: argparse.Namespace) -> list[str]:
    """Whether this container was started, or the run gave a sign of life, not long ago."""
    heartbeat = PurePosixPath(options.mount) / job.recipe.run.dir / "heartbeat.json"
    look = 'test -n "$(find "$1" "$2" -mmin "-$3" 2>/dev/null)"'
    return ["sh", "-c", literal(look), "alive", STARTED, literal(str(heartbeat)), str(options.patience)]


def _secret(item: str) -> tuple[str, str, str]:
    variable, source = _pair(item, "--secret")
    if not VARIABLE.fullmatch(variable):
        raise RecipeError(f"--secret {item!r} must have the form VARIABLE=SECRET or VARIABLE=SECRET/KEY")
    secret, _, key = source.partition("/")
    return variable, secret, key or variable


def _pair(item: str, option: str) -> tuple[str, str]:
    key, sign, value = item.partition("=")
    if not (key and sign and value):
        raise RecipeError(f"{option} {item!r} must have the form NAME=VALUE")
    return key, value


def submit(text: str) -> str:
    """Hand the documents to kubectl; what it answered. Raises TrainingError."""
    try:
        done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise TrainingError("kubectl is not on this machine; use --write FILE here and `kubectl apply -f FILE` where it is") from None
    if done.returncode != 0:
        raise TrainingError(f"kubectl refused the job: {' '.join(done.stderr.split())}; part of it may exist: `kubectl get jobs,cm,svc`")
    return "; ".join(done.stdout.split("\n")).strip("; ")
