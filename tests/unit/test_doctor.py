"""Each check says what is wrong and how to fix it; a whole visit ends with a verdict; nothing secret is shown, nothing stays behind."""

from __future__ import annotations

import json
import time
from collections import namedtuple
from pathlib import Path

import pytest

from bd3_scale import doctor
from bd3_scale.recipe import Recipe

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = Recipe()
    recipe.run.dir = str(tmp_path / "runs" / "new")
    return recipe


def test_this_machine_is_examined_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run: {{dir: {tmp_path}/run, device: cpu}}\ndata: {{path: {tmp_path}/data, source: documentation}}\n"
                    "training: {steps: 1}\nmodel: {layers: 1, hidden: 32, heads: 2}\n")  # fmt: skip
    status = doctor.main([str(path), "--json"])
    answer = json.loads(capsys.readouterr().out)
    states = {one["check"]: one["state"] for one in answer["checks"]}
    assert len(states) == len(doctor.CHECKS)
    for name in ("device", "backends", "disk", "clock", "attention", "all-reduce", "wandb", "data"):
        assert states[name] == "ok", answer
    assert answer["fit"] == (status == 0) == ("fail" not in states.values())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["recipe.yaml"], "nothing stays behind"


def test_a_check_that_fails_makes_the_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(recipe: Recipe) -> doctor.Finding:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "CHECKS", (doctor.backends, broken, doctor.open_files))
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    backends") and lines[1].startswith("fail  broken") and "no such device" in lines[1]
    assert "open files" in lines[2] and lines[-1] == "not fit to train: broken"


def test_kernels_are_surveyed_without_a_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.kernels,))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("bd3_scale.engines.kernel_probe.probe", lambda *arguments, **options: None)
    assert doctor.main([]) == 0, capsys.readouterr().out


def test_wrong_versions_are_named(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    assert any(one.startswith("megatron-core") for one in doctor.requirements())
    monkeypatch.setattr(doctor, "requirements", lambda: ["torch==1.0", "not-a-package>=1", "numpy>=1"])
    found = doctor.versions(recipe)
    assert found.state == "fail" and "torch" in found.text and "not-a-package is missing" in found.text and "numpy" not in found.text


def test_a_disk_that_is_small_or_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, tmp_path: Path) -> None:
    assert doctor.disk(recipe, probe=1 << 20).state in ("ok", "warn")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(10**9, 0, 10**9))
    found = doctor.disk(recipe, probe=1 << 20)
    assert found.state == "fail" and "checkpoint.keep = 3" in found.text and "run.dir" in found.cure
    recipe.run.dir = "/proc/none/run"  # a file system that takes no files, from root either
    found = doctor.disk(recipe, probe=1 << 20)
    assert found.state == "fail" and "cannot be written" in found.text


def test_a_clock_that_is_wrong_is_found(recipe: Recipe) -> None:
    assert doctor.clock(recipe).state == "ok"
    assert doctor.clock(recipe, now=lambda: time.time() - 30).state == "warn"
    found = doctor.clock(recipe, now=lambda: time.time() + 3600)
    assert found.state == "fail" and "chronyd" in found.cure and "3,6" in found.text


def test_little_shared_memory_warns(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(1 << 26, 0, 1 << 26))
    found = doctor.shared_memory(recipe, tmp_path)
    assert found.state == "warn" and "64 MiB" in found.text and "--shm-size" in found.cure
    assert doctor.shared_memory(recipe, tmp_path / "none").state == "warn"


def test_cuda_that_is_not_there_fails(recipe: Recipe) -> None:
    import torch

    recipe.run.device = "cuda"
    if not torch.cuda.is_available():
        found = doctor.device(recipe)
        assert found.state == "fail" and "run.device=cpu" in found.cure


def test_a_key_is_found_and_never_shown(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    assert doctor.wandb(recipe).state == "ok", "not asked for"
    recipe.tracking.wandb = "online"
    found = doctor.wandb(recipe)
    assert found.state == "fail" and "wandb login" in found.cure
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123secret\n")
    (tmp_path / "netrc").chmod(0o600)
    found = doctor.wandb(recipe)
    assert found.state == "ok" and "secret" not in str(found)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0123secret")
    found = doctor.wandb(recipe)
    assert found.state == "ok" and "secret" not in str(found)


def test_processes_that_do_not_meet_fail(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    monkeypatch.setattr(doctor, "ALL_REDUCE", "raise SystemExit('interface none0 not found')")
    found = doctor.all_reduce(recipe)
    assert found.state == "fail" and "none0" in found.text and "GLOO_SOCKET_IFNAME" in found.cure


def test_data_that_is_not_there_is_said(recipe: Recipe, tmp_path: Path) -> None:
    recipe.data.path = str(tmp_path / "rows")
    assert doctor.data(recipe).state == "warn" and "bd3 prepare" in doctor.data(recipe).cure
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "manifest.json").write_text("{}")
    assert doctor.data(recipe).state == "ok"


def test_what_several_nodes_need_is_said(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    for name in ("PET_NNODES", "PET_RDZV_BACKEND", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR", "PET_NODE_RANK", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    found = doctor.nodes(recipe)
    assert found.state == "ok" and "--rdzv-backend c10d --rdzv-endpoint HOST:PORT, or PET_RDZV_BACKEND" in found.text
    monkeypatch.setenv("PET_NNODES", "8")
    found = doctor.nodes(recipe)
    assert found.state == "warn" and "8 nodes" in found.text and "none is set here" in found.text and "PET_RDZV_ENDPOINT=" in found.cure
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "127.0.0.1:29400")
    assert doctor.nodes(recipe).state == "warn", "static, and no place is told"
    monkeypatch.setenv("PET_RDZV_BACKEND", "c10d")
    found = doctor.nodes(recipe)
    assert found.state == "ok" and "c10d at 127.0.0.1:29400, 8 node(s)" in found.text
    monkeypatch.setenv("PET_NNODES", "4:8")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    found = doctor.nodes(recipe)
    assert found.state == "warn" and "none can join later" in found.text and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in found.cure
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert doctor.nodes(recipe).state == "ok"
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "no-such-host.invalid:29400")
    assert doctor.nodes(recipe).state == "fail"
    monkeypatch.setenv("PET_NNODES", "eight")
    assert doctor.nodes(recipe).state == "fail"


def test_the_size_of_the_world_decides_how_many_files_are_enough(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda what: (4096, 8192))
    assert doctor.open_files(recipe, 8).state == doctor.open_files(recipe, 1024).state == "ok"
    found = doctor.open_files(recipe, 2048)
    assert found.state == "warn" and "ulimit -n" in found.cure and "2048 ranks" in found.text
    found = doctor.open_files(recipe, 16384)
    assert found.state == "fail" and "hard limit" in found.cure


def test_a_process_raises_its_own_limit() -> None:
    import resource

    from bd3_scale.files import raise_file_limit

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        assert raise_file_limit() > 512 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
