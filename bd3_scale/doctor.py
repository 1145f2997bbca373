"""`python -m bd3_scale.doctor [RECIPE] [key=value ...]`: is this machine fit to train; what is wrong, and how to fix it.

One line a check: ok, warn (a run starts, but) or fail (it will not work). With a recipe the checks are about its device, folders and
tracking; without, about the defaults. Run it on a node of the cluster, in the container and on the file system of the run.
Exit status: 0 unless a check fails, then 1; 2 for a recipe that cannot be read. `--json`: one document.

Invariants: nothing is installed or changed; what is written to measure (some files in the run's folder) is deleted; no key, token or
password is printed, only whether there is one; a check that breaks is itself a failed line and stops no other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bd3_scale import recipe as recipes
from bd3_scale.errors import UserError, one_line, without_credentials
from bd3_scale.files import expanded
from bd3_scale.program import run_program
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import DataConfig, SourceConfig

PATIENCE = 180.0
"""Seconds that two processes may take to import torch and to meet."""


@dataclass(frozen=True)
class Finding:
    """One line. `cure` is empty where nothing is wrong."""

    check: str
    state: str
    """ok | warn | fail."""
    text: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.state:5s} {self.check:12s} {self.text}" + (f"; {self.cure}" if self.cure else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bd3 doctor", description="Check whether this machine is fit to train.")
    parser.add_argument("recipe", nargs="?", help="a YAML file; without one the defaults are checked")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example run.dir=/scratch/run")
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="processes of the whole job (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipes.settle()
        recipe = recipes.load(options.recipe, options.overrides) if options.recipe else Recipe()
        if not options.recipe:
            recipe.run.dir, recipe.training.steps = "runs", 1  # which has no default
    except UserError as error:
        return error.say()
    findings = []
    for check in CHECKS:
        if check is data and not options.recipe:
            continue
        finding = examine(check, recipe, *([options.ranks] if check is open_files else []))
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    failed = [finding.check for finding in findings if finding.state == "fail"]
    if options.json:
        print(json.dumps({"fit": not failed, "checks": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(f"\nnot fit to train: {', '.join(failed)}" if failed else "\nfit to train")
    return 1 if failed else 0


def examine(check: Callable[..., Finding], recipe: Recipe, *rest: int) -> Finding:
    """The check's answer; a check that raises has found something, too."""
    try:
        return check(recipe, *rest)
    except Exception as error:  # whatever is wrong with a machine must not hide what else is
        text = one_line(error, 300)
        name = check.__name__.replace("_", " ")
        return Finding(name, "fail", f"the check broke: {type(error).__name__}: {text}", "fix what the message names, and run this again")


# -- Software and device -----------------------------------------------------------------------------------------------


def versions(recipe: Recipe) -> Finding:
    """Every requirement of this package, against what is installed."""
    from packaging.requirements import Requirement

    wrong, seen = [], []
    for requirement in map(Requirement, requirements()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        if requirement.name in ("torch", "deepspeed", "megatron-core", "mosaicml-streaming"):
            seen.append(f"{requirement.name} {version}")
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        wrong.append(f"Python {platform.python_version()} is neither 3.11 nor 3.12")
    if wrong:
        return Finding("versions", "fail", ", ".join(wrong), "pip install -e . in a fresh environment of Python 3.11")
    return Finding("versions", "ok", f"Python {platform.python_version()}, {', '.join(seen)}")


def requirements() -> list[str]:
    """As the source tree has them, else as the installed package does."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text())["project"]["dependencies"]
    return importlib.metadata.requires("bd3_scale") or []


def device(recipe: Recipe) -> Finding:
    import psutil
    import torch

    from bd3_scale.costs.flops import peak_flops

    chosen = recipes.resolve_device(recipe.run.device) if recipe.run.device != "cuda" or torch.cuda.is_available() else "none"
    if chosen == "none":
        cure = "run on a node with a GPU and a driver, install a CUDA build of torch, or set run.device=cpu"
        return Finding("device", "fail", f"run.device is cuda, but torch {torch.__version__} finds no CUDA device", cure)
    if chosen == "cpu":
        text = f"cpu, {len(os.sched_getaffinity(0))} cores, {psutil.virtual_memory().available / 2**30:.1f} GiB of memory free"
        return Finding("device", "ok", text)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    free = min(torch.cuda.mem_get_info(index)[0] / torch.cuda.mem_get_info(index)[1] for index in range(len(names)))
    text = f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"
    if len(set(names)) > 1:
        return Finding("device", "warn", f"{text}, but of different kinds: {', '.join(sorted(set(names)))}", "the slowest sets the pace")
    if free < 0.9:
        return Finding(
            "device", "warn", f"{text}, but of one only {free:.0%} of the memory is free", "end what else runs there (nvidia-smi)"
        )
    if recipes.resolve_precision(recipe.training, "cuda") == "bf16" and not torch.cuda.is_bf16_supported():
        return Finding("device", "fail", f"{text} has no bf16", "set training.precision=fp32 or take an Ampere GPU or later")
    if peak_flops(names[0], "bf16") is None:
        return Finding("device", "warn", f"{text}: its peak is not in the table", "training works; MFU will be null")
    return Finding("device", "ok", text)


def backends(recipe: Recipe) -> Finding:
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Finding("backends", "fail", "this torch has no gloo", "install torch from the registry or from pytorch.org")
    if torch.cuda.is_available() and not dist.is_nccl_available():
        return Finding("backends", "fail", "there is a CUDA device, but this torch has no NCCL", "install a CUDA build of torch for Linux")
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if torch.cuda.is_available() else ""
    return Finding("backends", "ok", f"gloo{nccl}")


def compiler(recipe: Recipe) -> Finding:
    """torch.compile and FlexAttention need one."""
    import torch

    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if found:
        return Finding("compiler", "ok", found)
    needed = recipe.training.compile != "none" or recipe.model.head_loss == "fused" or torch.cuda.is_available()
    text = "no C compiler is found (CC, gcc, cc, clang)"
    if needed:
        return Finding(
            "compiler",
            "fail",
            f"{text}, and torch.compile needs one",
            "install gcc, or set training.compile=none and model.head_loss=eager on CPU",
        )
    return Finding("compiler", "ok", f"{text}; nothing here needs one")


# -- Folders and memory ------------------------------------------------------------------------------------------------


def run_folder(dir: str) -> Path:
    """The nearest existing folder of run.dir: where a run would write."""
    folder = expanded(dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def disk(recipe: Recipe, probe: int = 1 << 26) -> Finding:
    """Room for the checkpoints that are kept, and the speed of `probe` bytes written and forced to the disk."""
    folder = run_folder(recipe.run.dir)
    free = shutil.disk_usage(folder).free
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(probe >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = probe / (time.perf_counter() - start)
    except OSError as error:
        return Finding("disk", "fail", f"{folder} cannot be written ({error.strerror})", "set run.dir to a folder that can")
    needed = checkpoint_bytes(recipe) * (recipe.checkpoint.keep + 1 if recipe.checkpoint.keep else 10)
    text = f"{folder}: {free / 2**30:.1f} GiB free, {speed / 1e6:,.0f} MB/s"
    if free < needed:
        keeps = f"checkpoint.keep = {recipe.checkpoint.keep} takes {needed / 2**30:.1f} GiB"
        return Finding("disk", "fail", f"{text}, but {keeps}", "set run.dir to a larger disk, or checkpoint.keep=1")
    if speed < 50e6:
        seconds = checkpoint_bytes(recipe) / speed
        return Finding(
            "disk", "warn", f"{text}: a checkpoint takes {seconds:,.0f} s", "set run.dir to a faster disk, or raise checkpoint.every"
        )
    return Finding("disk", "ok", text)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Of a network with GPT-2's vocabulary at most."""
    from bd3_scale.costs import state_memory

    return state_memory.checkpoint_bytes(recipe.model, recipe.training, 258 if recipe.data.tokenizer == "bytes" else 50258)


def shared_memory(recipe: Recipe, folder: Path = Path("/dev/shm")) -> Finding:
    """NCCL and loaders exchange data through it."""
    if not folder.is_dir():
        return Finding("shared memory", "ok" if sys.platform == "darwin" else "warn", f"there is no {folder}", "mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    if free < 1 << 30:
        cure = "docker run --shm-size=16g or --ipc=host; in Kubernetes an emptyDir of medium Memory at /dev/shm"
        return Finding("shared memory", "warn", f"{folder} has {free / 2**20:.0f} MiB free; NCCL wants some GiB", cure)
    return Finding("shared memory", "ok", f"{folder} has {free / 2**30:.1f} GiB free")


def clock(recipe: Recipe, now: Callable[[], float] = time.time) -> Finding:
    """Of this machine, against the one that stamps files in the run's folder: a file server, where it is shared."""
    folder = run_folder(recipe.run.dir)
    before = now()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"-")
        file.flush()
        os.fsync(file.fileno())
        stamp = os.stat(file.name).st_mtime
    after = now()
    skew = max(before - stamp, stamp - after, 0.0)
    if skew > 5:
        cure = "start chronyd or ntpd on the nodes and on the file server"
        return Finding("clock", "warn" if skew < 120 else "fail", f"this machine and {folder} are {skew:,.0f} s apart", cure)
    return Finding("clock", "ok", f"within {max(skew, 0.1):.1f} s of {folder}")


def open_files(recipe: Recipe, ranks: int = 8) -> Finding:
    """A rank raises its own limit as far as it may; the launcher, which holds the store that all ranks are connected to, does not."""
    import resource

    from bd3_scale.files import files_needed

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, forever = files_needed(ranks), resource.RLIM_INFINITY
    if hard != forever and hard < needed:
        cure = f"let the administrator raise the hard limit (limits.conf, LimitNOFILE, --ulimit nofile) to {needed} or more"
        return Finding("open files", "fail", f"a process may open {hard} at most, {ranks} ranks need {needed}", cure)
    if soft != forever and soft < needed:
        text = f"a process may open {soft} (at most {hard}), the launcher of {ranks} ranks needs {needed}"
        return Finding("open files", "warn", text, f"ulimit -n {needed} before the start")
    return Finding("open files", "ok", f"{'no limit' if soft == forever else f'{soft:,}'}, {ranks} ranks need {needed:,} (--ranks N)")


def data(recipe: Recipe) -> Finding:
    sources: Sequence[DataConfig | SourceConfig] = recipe.data.mixture or [recipe.data]
    for source in sources:
        path = expanded(source.path)
        if (path / "manifest.json").is_file() or source.remote:
            continue
        if not recipe.data.mixture and recipe.data.source:
            return Finding("data", "ok", f"{path} will be prepared from {recipe.data.source}")
        cure = f"bd3 prepare --path {path} ..., or set data.path or data.remote"
        return Finding("data", "warn", f"{path} holds no manifest.json", cure)
    shown = (f"{source.path}{' from ' + without_credentials(source.remote) if source.remote else ''}" for source in sources)
    return Finding("data", "ok", ", ".join(shown))


# -- What a run does first ---------------------------------------------------------------------------------------------

ALL_REDUCE = """
import datetime, sys, torch, torch.distributed as dist
backend, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl": torch.cuda.set_device(device)
dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
value = torch.full((1 << 20,), float(rank + 1), device=device)
dist.all_reduce(value)
assert bool((value == 3).all()), "the sum is wrong"
dist.destroy_process_group()
"""


def all_reduce(recipe: Recipe) -> Finding:
    """Two processes add a tensor: NCCL where there are two GPUs, else gloo."""
    import torch

    backend = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank-{rank}" for rank in range(2)]
        processes = []
        for rank, output in enumerate(outputs):
            command = [sys.executable, "-W", "ignore", "-c", ALL_REDUCE, backend, f"{folder}/store", str(rank)]
            with output.open("w") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        end = time.monotonic() + PATIENCE
        try:
            codes = [process.wait(max(0.1, end - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said = [line for output in outputs for line in output.read_text().splitlines() if line.strip()]
    if any(codes):
        why = f"no answer within {PATIENCE:.0f} s" if -1 in codes else said[-1][:300] if said else f"status {codes}"
        variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        cure = f"set {variable} to an interface that works (lo, eth0), see that the host name resolves (/etc/hosts)"
        return Finding(
            "all-reduce", "fail", f"two processes on {backend}: {why}", f"{cure}{', NCCL_DEBUG=INFO says more' * (backend == 'nccl')}"
        )
    return Finding("all-reduce", "ok", f"two processes on {backend}")


def nodes(recipe: Recipe) -> Finding:
    """Whether torchrun's command as it stands would find the other nodes."""
    from bd3_scale.launching.meeting import advice

    return Finding("nodes", *advice(os.environ))


def attention(recipe: Recipe) -> Finding:
    """The kernel of the device, forwards and backwards, against the dense reference."""
    import torch

    from bd3_scale.attention.kernels import attend
    from bd3_scale.attention.mask import AttentionPattern

    cuda = torch.cuda.is_available() and recipe.run.device != "cpu"
    kernel, place = ("flex", "cuda") if cuda else ("tiled", "cpu")
    pattern, worst = AttentionPattern("block_diffusion", 256, 16), 0.0
    torch.manual_seed(0)
    rows = [torch.randn(512, 1, 4, 64, device=place) for _ in range(4)]
    gradients = []
    for name in (kernel, "dense"):
        q, k, v = (one.clone().requires_grad_() for one in rows[:3])
        out = attend(q, k, v, pattern, name)
        out.backward(rows[3])
        gradients.append([out.detach(), *(one.grad for one in (q, k, v))])
    for mine, reference in zip(*gradients, strict=True):
        assert mine is not None and reference is not None
        worst = max(worst, float((mine - reference).abs().max() / reference.abs().max()))
    if not worst < (5e-3 if cuda else 1e-4):  # on CUDA fp32 products may be TF32
        return Finding(
            "attention", "fail", f"{kernel} on {place} differs from the reference by {worst:.1e}", "set model.attention=dense and report it"
        )
    name = "FlexAttention, compiled" if cuda else "tiled"
    return Finding("attention", "ok", f"{name} on {place}, forwards and backwards: within {worst:.0e} of the reference")


def kernels(recipe: Recipe) -> Finding:
    """What of FlexAttention's backends and max-autotune works here, and whether what the recipe asks for does."""
    import torch

    from bd3_scale.engines.kernel_probe import OPTIONS, survey

    asked = [f"{key} = {value}" for key, value in OPTIONS if recipes.flatten(recipe)[key] == value]
    if not torch.cuda.is_available() or recipe.run.device == "cpu":
        if asked:
            return Finding("kernels", "fail", f"{' and '.join(asked)} without CUDA", "set model.attention=auto and training.compile=none")
        return Finding("kernels", "ok", f"cpu: {', '.join(value for _, value in OPTIONS)} need CUDA, and nothing asks for them")
    works, broken = survey(recipe, torch.device("cuda"))
    text = f"these work: {', '.join(works) or 'none'}"
    for name, error in broken.items():
        if name in asked:
            what, _, cure = error.rpartition("; ")
            return Finding("kernels", "fail", f"{what}; {text}", cure)
    missing = "".join(f"; not asked for: {error.rpartition('; ')[0]}" for error in broken.values())
    return Finding("kernels", "ok", text + missing)


def wandb(recipe: Recipe) -> Finding:
    """Only where the recipe wants it; a key is looked for, never shown."""
    mode = recipe.tracking.wandb
    if mode != "online":
        return Finding("wandb", "ok", f"tracking.wandb={mode} needs no account")
    version = importlib.metadata.version("wandb")
    if os.environ.get("WANDB_API_KEY") or _in_netrc():
        return Finding("wandb", "ok", f"{version}, a key is there")
    return Finding(
        "wandb", "fail", f"{version}, but tracking.wandb=online and no key is found", "wandb login, or set tracking.wandb=offline"
    )


def _in_netrc() -> bool:
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    path = expanded(os.environ.get("NETRC", "~/.netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


CHECKS: tuple[Callable[[Recipe], Finding], ...] = (
    versions, device, backends, compiler, disk, clock, shared_memory, open_files, data, attention, kernels, all_reduce, nodes, wandb,
)  # fmt: skip
"""In the order in which they are shown."""


if __name__ == "__main__":
    run_program(main)
