"""tools/study.py: its variances are those of drawn losses, and a tiny run of each study gives every row a number."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "study.py"
TINY = [
    *("model.context=32", "model.layers=1", "model.hidden=16", "model.heads=2", "data.source=null"),
    *("training.global_batch=4", "validation.rows=8"),
]


@pytest.fixture(scope="module")
def study() -> Any:
    specification = importlib.util.spec_from_file_location("study", TOOL)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["study"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules["study"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 32 bytes."""
    from bd3_scale.data.preparation.packing import Document
    from bd3_scale.data.preparation.prepare import Packing, prepare
    from bd3_scale.data.tokenizer import load_tokenizer

    path, tokenizer = tmp_path_factory.mktemp("study") / "data", load_tokenizer("bytes")
    tokens = tokenizer.encode_batch([f"The number {n} is the square of no number but {n * 7 % 13}." for n in range(60)])
    documents = [Document(str(n), np.array(text), n % 4 == 0) for n, text in enumerate(tokens)]
    prepare(path, Packing(tokenizer, context=32), "sentences", None, lambda: documents)
    return path


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("schedule", ["linear", "sqrt", "log", "square", "cosine"])
@pytest.mark.parametrize("interval", [(0.2, 1.0), (0.3, 0.8)])
def test_integrated_variance_is_the_variance_of_drawn_losses(study: Any, size: int, schedule: str, interval: tuple[float, float]) -> None:
    """With a nll that depends on which tokens are masked, one pass at t ~ U[1e-3, 1] gives what draws under other noise give."""
    random, rows, blocks = np.random.default_rng(0), 400, 50
    nll = random.gamma(2.0, size=size)

    def draw(noise: Any, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        masked = random.random((*times.shape, size)) < noise.schedule.mask_probability(times)[..., None]
        return masked.sum(-1), (masked * nll).sum(-1) * (1 + 0.3 * masked.sum(-1))

    from bd3_scale.objectives.noise import LINEAR, schedule_named

    validation, wanted = study.Noise(LINEAR, (1e-3, 1.0)), study.Noise(schedule_named(schedule), interval)
    np.testing.assert_allclose(wanted.integrals(size)[0].sum(), 1.0, rtol=1e-12)
    count, sums = draw(validation, random.uniform(1e-3, 1.0, (rows, blocks)))
    measured = study.Measured(count, sums, np.full(blocks, size), validation)
    variance, error = measured.variance(wanted)

    times = random.uniform(*interval, (rows, blocks))
    losses = draw(wanted, times)[1] * wanted.schedule.weight(times) / size
    deviations = np.square(losses - losses.mean())
    direct_error = deviations.std() / math.sqrt(losses.size)
    assert error < 0.1 * variance
    assert abs(variance - losses.var()) < 4 * math.hypot(error, direct_error)


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@pytest.mark.parametrize(
    ("name", "rows", "extra"), [("single-token", 5, ["1", "--pair-steps", "2"]), ("schedules", 8, ["1", "--block-sizes", "4"])]
)
def test_a_tiny_study_reports_every_training(
    name: str, rows: int, extra: list[str], study: Any, folder: Path, tmp_path: Path, world_of_one: object
) -> None:
    command = [name, *TINY, f"data.path={folder}", "--steps", *extra, "--work", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert study.main(command) == 0
    (document,) = (tmp_path / "out").glob(f"*-study-{name}.json")
    report = json.loads(document.read_text())
    lines = report["result"]["rows"]
    assert len(lines) == rows
    assert len({(line["block_size"], line["training"], line["steps"]) for line in lines}) == rows
    for line in lines:
        keys = ("perplexity", "perplexity_integrated", "variance", "variance_standard_error", "variance_direct")
        assert all(finite(line[key]) and line[key] > 0 for key in keys), line
    text = document.with_suffix(".md").read_text()
    assert all(f"| {line['training']} |" in text for line in lines)
    assert len(report["checks"]) >= 2
    assert 1000 < document.with_suffix(".png").stat().st_size < 150_000
    if name == "schedules":
        assert len(report["result"]["clips"]) == 36
        assert all(finite(clip["variance"]) for clip in report["result"]["clips"])


def test_a_tiny_study_of_the_noise(study: Any, folder: Path, tmp_path: Path, world_of_one: object) -> None:
    """Every arm has its numbers; what is drawn uniformly is measured against itself."""
    arms = ["beta [2, 2]", "learned density", "tuned interval", "2 draws, complement", "4 draws", "4 draws, equal FLOPs", "mixture"]
    few = ["--steps", "4", "--block-sizes", "4", "2", "--seeds", "1", "--draws", "4", "--arms", *arms]
    command = ["variance", *TINY, f"data.path={folder}", *few, "--work", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert study.main(command) == 0
    (document,) = (tmp_path / "out").glob("*-study-variance.json")
    report = json.loads(document.read_text())
    rows = report["result"]["rows"]
    lines = {line["training"]: line for line in rows if line["block_size"] == 4}
    assert len(rows) == 2 * len(lines) == 2 * (len(arms) + 1) and len(report["checks"]) == 4
    numbers = ("flops", "block_variance", "loss_variance", "controlled_variance", "gradient_variance", "nelbo")
    assert all(finite(line[key]) and line[key] > 0 for line in lines.values() for key in numbers), lines
    assert all(lines["uniform"][key] == 1.0 for key in ("flops", "block_variance", "loss_variance", "gradient_variance"))
    assert lines["learned density"]["block_variance"] < 1 < lines["beta [2, 2]"]["block_variance"]
    assert lines["learned density"]["bound"] == "yes" != lines["tuned interval"]["bound"]
    assert lines["4 draws"]["flops"] < lines["2 draws, complement"]["flops"] < 1
    assert lines["4 draws"]["steps"] == 4 and lines["4 draws, equal FLOPs"]["steps"] == round(4 / lines["4 draws"]["flops"])
    assert "| learned density |" in document.with_suffix(".md").read_text()
