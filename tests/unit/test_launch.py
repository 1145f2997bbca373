"""bd3_scale.launch: what is rendered is whole, says what was asked for and nothing else, and a bad recipe never gets that far."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bd3_scale import launch, train
from bd3_scale.launching.rendering import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "owt_1b.yaml")
CLAIM = ["--image", "registry/bd3:1", "--claim", "runs"]
KINDS = ("job", "pytorchjob", "trainjob")
EVERYTHING = {
    "slurm": shlex.split(
        "--partition h100 --account us --qos high --time 1-0 --setup 'module load x' --sbatch-option exclusive "
        "--srun-option container-image=a:b --cpus-per-node 96 --memory-per-node 900G --env A=b"
    ),
    "kubernetes": shlex.split(
        f"{' '.join(CLAIM)} --remote s3://b/f --secret AWS_ACCESS_KEY_ID=aws --secret T=s/k --resource rdma/ib=8 --node-selector pool=h100 "
        "--toleration gpu:NoSchedule --toleration x --service-account sa --pull-secret ps --data-cache /cache --cpus-per-node 96 "
        "--memory-per-node 900Gi --env A=b --namespace ml"
    ),
}
ODD = "a 'b' \"c\" $(touch INJECTED) `id` ${HOME} $(HOME) # d \\ %j {{ x }} {% y %} : - & * ! é \U0001f600"


def rendered(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status = launch.main([*words, "--dry-run"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert launch.main([*words, "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("bd3_scale: error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("bd3_scale: error: ")


def commands(*extra: str) -> list[list[str]]:
    targets = [["slurm", RECIPE, *extra], *(["kubernetes", RECIPE, *extra, *CLAIM, "--kind", kind] for kind in KINDS)]
    return [*targets, *([*words, *EVERYTHING[words[0]]] for words in targets)]


def documents(text: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def container(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The part of a job that says what to run."""
    if "TrainJob" in found:
        return found["TrainJob"]["spec"]["trainer"]
    pods = found["Job"]["spec"] if "Job" in found else found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]
    return pods["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("words", commands("--nodes", "8"), ids=lambda words: "-".join(words[:1] + words[-1:]))
def test_rendering_is_whole_and_repeatable(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(capsys, *words)
    assert text == rendered(capsys, *words)
    assert not any(mark in text for mark in ("{{", "{%", "}}", "%}", "Undefined", ": null", "- null", "=None", '"None"'))
    assert all(line == line.rstrip() for line in text.splitlines()), [line for line in text.splitlines() if line != line.rstrip()]
    if words[0] == "kubernetes":
        found = documents(text)
        assert found["ConfigMap"]["data"]["recipe.yaml"] == Path(RECIPE).read_text()
        arguments = container(found)["args"]
        assert arguments[arguments.index("bd3_scale.train") + 1] == "/etc/bd3_scale/recipe.yaml"


def test_sizes_and_site_come_from_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(capsys, "slurm", RECIPE, "--nodes", "8", *EVERYTHING["slurm"])
    for line in ("nodes=8", "gpus-per-node=8", "partition=h100", "account=us", "qos=high", "time=1-0", "exclusive", "requeue"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --signal=B:USR1@120\n" in text and "#SBATCH --mem=900G\n" in text
    by_hand = rendered(
        capsys, "slurm", RECIPE, "--nodes", "8", "--sbatch-option", "gres=gpu:h100:8", "--sbatch-option", "signal=B:USR1@300"
    )
    assert "gpus-per-node" not in by_hand and "--gres=gpu:h100:8\n" in by_hand and by_hand.count("--signal=") == 1
    assert "account" not in by_hand and "partition" not in by_hand

    found = documents(rendered(capsys, "kubernetes", RECIPE, "--nodes", "1:2", *EVERYTHING["kubernetes"], "--priority-class", "low"))
    job, pod = found["Job"]["spec"], found["Job"]["spec"]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    assert pod["terminationGracePeriodSeconds"] == 120 and pod["priorityClassName"] == "low" and pod["restartPolicy"] == "Never"
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": "8", "cpu": "96", "memory": "900Gi", "rdma/ib": "8"}
    assert "1:2" in pod["containers"][0]["args"] and "checkpoint.remote=s3://b/f/owt-1b" in pod["containers"][0]["args"]
    assert pod["subdomain"] == found["Service"]["metadata"]["name"] and found["Service"]["spec"]["clusterIP"] == "None"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes.keys()
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    elastic = documents(rendered(capsys, "kubernetes", RECIPE, "--nodes", "1:2", "--kind", "pytorchjob", *CLAIM))
    policy = elastic["PyTorchJob"]["spec"]["elasticPolicy"]
    assert (policy["minReplicas"], policy["maxReplicas"], policy["nProcPerNode"]) == (1, 2, 8)


def test_recipe_is_refused_as_training_would(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same line, before anything is rendered."""
    monkeypatch.setenv("RANK", "0")
    for override in ("parallel.tensor=3", "training.stepz=3", "model.heads=7", "training.precision=fp16", "training.global_batch=30"):
        monkeypatch.setenv("WORLD_SIZE", "64")
        assert train.main([RECIPE, override]) == 2
        said = capsys.readouterr().err.removeprefix("bd3_scale: error: ")
        for target in (["slurm"], ["kubernetes", *CLAIM]):
            assert refused(capsys, target[0], RECIPE, override, "--nodes", "8", *target[1:]) == said
    # 56 ranks are no whole replicas of 16; a job that may shrink to that must not begin.
    assert "--nodes 6:8, at 7 node(s): " in refused(capsys, "slurm", RECIPE, "parallel.tensor=16", "parallel.shard=null", "--nodes", "6:8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm", RECIPE, "--nodes", "0"], "--nodes 0"),
        (["slurm", RECIPE, "--nodes", "8:4"], "--nodes 8:4"),
        (["slurm", RECIPE, "--nodes", "8", "--name", "a\n#SBATCH --uid=0"], "line break"),
        (["slurm", RECIPE, "--nodes", "8", "--env", "A;id=b"], "--env"),
        (["slurm", RECIPE, "--nodes", "8", "--sbatch-option", "a b=c"], "--sbatch-option"),
        (["slurm", RECIPE, "--nodes", "8", "--processes-per-node", "9"], "needs a GPU"),
        (["kubernetes", RECIPE, "--nodes", "8", "--image", "i"], "--claim"),
        (["kubernetes", RECIPE, "--nodes", "1", "--image", "i"], "neither --claim nor --remote"),
        (["kubernetes", RECIPE, "--nodes", "8", *CLAIM, "run.dir=/elsewhere"], "--mount"),
        (["kubernetes", RECIPE, "--nodes", "8", *CLAIM, "run.dir=../elsewhere"], "--mount"),
        (["kubernetes", RECIPE, "--nodes", "8", *CLAIM, "--name", "Owt_1b"], "--name"),
        (["kubernetes", RECIPE, "--nodes", "1:2", *CLAIM, "--kind", "trainjob"], "set --kind"),
        (["kubernetes", RECIPE, "--nodes", "8", "--gpus-per-node", "0", *CLAIM], "--cpus-per-node"),
        (["kubernetes", RECIPE, "--nodes", "8", *CLAIM, "data.source=documentation", "--data-cache", "/c"], "--data-cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *words)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH with stand-ins: srun writes its words down, waits as long as told and ends as told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_ins = {
        "srun": "trap 'echo told >> \"$BENCH/told\"; exit 143' USR1\n"
        'printf "%s\\0" "$@" > "$BENCH/srun"; printenv X > "$BENCH/x"\n'
        'for _ in $(seq "$TENTHS"); do sleep 0.1; done; exit "$STATUS"',
        "scontrol": 'echo "$@" >> "$BENCH/scontrol"; [ "$1" != show ] || printf "n1\\nn2\\n"',
    }
    for name, text in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    for key, value in {
        "PATH": f"{folder}:{os.environ['PATH']}", "BENCH": str(tmp_path), "STATUS": "0", "TENTHS": "0",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(capsys: pytest.CaptureFixture[str], bench: Path, *words: str) -> Path:
    file = bench / "train.sbatch"
    file.write_text(rendered(capsys, "slurm", RECIPE, "--nodes", "8", *words))
    return file


def check_arrival(word: str, kinds: tuple[str, ...], capsys: pytest.CaptureFixture[str], bench: Path) -> None:
    """`word` in an override, a variable and the job's name, through bash, and through YAML and Kubernetes' own $(NAME)."""
    # What OmegaConf makes of a value is not asked here: YAML quotes it.
    override = "run.name=" + yaml.safe_dump(word.replace("${", "$ {"), default_style="'", width=10**6, allow_unicode=True).strip()
    file = script(capsys, bench, override, "--env", f"X={word}", f"--name={word}")
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    assert subprocess.run(["bash", file], capture_output=True, check=False).returncode == 0
    assert (bench / "srun").read_text().split("\0")[-2] == override
    assert (bench / "x").read_text() == f"{word}\n" and not list(bench.rglob("INJECTED"))
    for kind in kinds:
        text = rendered(capsys, "kubernetes", RECIPE, override, "--nodes", "8", *CLAIM, "--kind", kind, "--env", f"X={word}", "--name", "n")
        found = container(documents(text))
        assert found["args"][-1].replace("$$(", "$(") == override
        assert found["env"] == [{"name": "X", "value": word.replace("$(", "$$(")}]


def test_odd_words_arrive_as_they_were_written(capsys: pytest.CaptureFixture[str], bench: Path) -> None:
    check_arrival(ODD, KINDS, capsys, bench)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word=st.text(st.characters(exclude_categories=("C", "Zl", "Zp", "Zs"), include_characters=" '\"\\$`(){}#%&*!:"), min_size=1))
def test_any_word_arrives_as_it_was_written(word: str, capsys: pytest.CaptureFixture[str], bench: Path) -> None:
    check_arrival(word, ("job",), capsys, bench)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True), (1, False), (137, False)])
def test_status_of_the_step_decides(status: int, requeued: bool, capsys: pytest.CaptureFixture[str], bench: Path, monkeypatch: Any) -> None:
    file = script(capsys, bench)
    monkeypatch.setenv("STATUS", str(status))
    done = subprocess.run(["bash", file], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("requeue 7" in (bench / "scontrol").read_text()) is requeued
    words = (bench / "srun").read_text().split("\0")
    assert words[words.index("--rdzv-endpoint") + 1] == "n1:29400" and words[words.index("--rdzv-id") + 1] == "7-0"
    assert words[words.index("--nnodes") + 1] == "2"


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_signal_goes_on_to_the_step(name: str, capsys: pytest.CaptureFixture[str], bench: Path, monkeypatch: Any) -> None:
    file = script(capsys, bench)
    monkeypatch.setenv("TENTHS", "300")
    process = subprocess.Popen(["bash", file])
    end = time.monotonic() + 20
    while not (bench / "x").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    assert process.wait(20) == 143
    assert (bench / "told").read_text() == "told\n" and "requeue 7" in (bench / "scontrol").read_text()


def test_shellcheck_finds_nothing(capsys: pytest.CaptureFixture[str], bench: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script(capsys, bench, *EVERYTHING["slurm"])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("target", "program"), [("slurm", "sbatch"), ("kubernetes", "kubectl")])
def test_what_is_submitted_is_what_is_shown(target: str, program: str, capsys: pytest.CaptureFixture[str], bench: Path) -> None:
    stand_in = bench / "bin" / program
    stand_in.write_text('#!/bin/sh\ncat > "$BENCH/taken"; echo "job 7 taken"; echo why >&2; exit "$STATUS"\n')
    stand_in.chmod(0o755)
    words = [target, RECIPE, "--nodes", "8", *(CLAIM if target == "kubernetes" else [])]
    shown = rendered(capsys, *words)
    assert launch.main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("job 7 taken: 500000 steps on 8 node(s) x 8 process(es)") and (bench / "taken").read_text() == shown
    assert launch.main([*words, "--write", "file"]) == 0 and Path("file").read_text() == shown
    capsys.readouterr()
    os.environ["STATUS"] = "1"
    assert launch.main(words) == 1
    assert f"{program} refused the job: why" in capsys.readouterr().err


def test_every_template_is_shipped() -> None:
    """The package's data name them all."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["bd3_scale.launching"]
    shipped = [path for path in TEMPLATES.rglob("*") if path.is_file()]
    assert len(shipped) > 10
    for path in shipped:
        assert any(fnmatch.fnmatch(str(path.relative_to(TEMPLATES.parent)), pattern) for pattern in patterns)


def test_image_copies_what_is_there() -> None:
    """What the Dockerfile copies exists, and the list of what the builder sees lets it through."""
    text = (ROOT / "cluster" / "docker" / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    seen = (ROOT / "cluster" / "docker" / "Dockerfile.dockerignore").read_text().split()
    assert len(copied) >= 6
    for word in copied:
        assert (ROOT / word).exists() and f"!{word}" in seen
