"""Sixty steps of the quickstart's recipe with dropout, on every engine: one process, one GPU, one training after another.

All trainings have the same rows, noise and initial weights, so that their losses differ by rounding alone. Each is made once, when the
first test asks for it; what it waited for is noted while it runs.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3_scale import recipe as recipes
from bd3_scale import train
from bd3_scale.distributed import layout
from bd3_scale.rules.validate import validate
from tests.gpu.device import DEVICE, REHEARSAL, needs_gpu, world
from tests.gpu.waits import UNWATCHED_STEPS, Waits
from tests.invented import prepare_invented

pytestmark = needs_gpu

ROOT = Path(__file__).parents[2]
STEPS, CONTEXT, VOCABULARY = 16 if REHEARSAL else 60, 128, 257
LAST = 10
"""Steps over which the loss at the end is averaged."""
COMMON = [
    f"run.device={DEVICE.type}", f"model.context={CONTEXT}", "model.dropout=0.1", "objective.block_size=16",
    "data.source=null", "data.tokenizer=bytes",
    f"training.steps={STEPS}", "training.learning_rate_schedule=constant", "training.learning_rate=2e-3", f"training.warmup={STEPS // 6}",
    "validation.every=0", "validation.rows=32", "checkpoint.every=0",
    "tracking.every=1", "tracking.plots=false", "tracking.progress=false", "tracking.sample_tokens=0",
]  # fmt: skip


def engine(name: str, zero: int, precision: str, *more: str) -> list[str]:
    return [f"parallel.engine={name}", f"parallel.zero={zero}", f"training.precision={precision}", *more]


RUNS = {
    "fp32": engine("megatron", 1, "fp32"),
    "megatron": engine("megatron", 1, "bf16"),
    "deepspeed zero 1": engine("deepspeed", 1, "bf16"),
    "deepspeed zero 2": engine("deepspeed", 2, "bf16"),
    "deepspeed zero 3": engine("deepspeed", 3, "bf16"),
    "fsdp": engine("fsdp", 3, "bf16"),
    "compiled": engine("megatron", 1, "bf16", "training.compile=blocks"),
}
BF16 = [name for name in RUNS if name != "fp32"]
PRECISION = 0.01
"""Relative difference of the loss at the end: bf16 and fp32."""
OWN_WAITS = ("deepspeed/runtime/zero/stage3.py", "deepspeed/runtime/zero/partition_parameters.py")
"""Where DeepSpeed's ZeRO 3 waits for its own streams and makes the norm of all gradients, in each step, whatever is trained."""
SAME = 0.004
"""That of two trainings in the same precision whose sums may be made in another order."""


@dataclass(frozen=True)
class Training:
    folder: Path
    losses: np.ndarray
    """Of every step."""
    validation: float
    waits: Waits

    @property
    def end(self) -> float:
        return float(self.losses[-LAST:].mean())


class Trainings:
    """Makes each training once; one that failed fails for all who ask."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, prepare_invented(folder / "data", CONTEXT)
        self.made: dict[str, Training | Exception] = {}

    def __call__(self, name: str) -> Training:
        if name not in self.made:
            try:
                self.made[name] = self.train(name.replace(" ", "-"), RUNS[name])
            except Exception as error:
                self.made[name] = error
        made = self.made[name]
        if isinstance(made, Exception):
            raise made
        return made

    def train(self, name: str, overrides: list[str]) -> Training:
        folder = self.folder / name
        recipe = recipes.load(ROOT / "recipes/quickstart.yaml", [f"run.dir={folder}", f"data.path={self.data}", *COMMON, *overrides])
        validate(recipe, 1, DEVICE.type)
        waits = Waits()
        here = layout.start(recipe.parallel, DEVICE.type)
        compiled_on_cpu = REHEARSAL and recipe.training.compile != "none"  # its reads cannot be seen
        try:
            with nullcontext() if compiled_on_cpu else waits.of_steps():
                train.train(recipe, here)
        finally:
            layout.stop()
            gc.collect()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
        nelbo = [line["nelbo"] for line in lines if line["kind"] == "validation"][-1]
        return Training(folder, np.array([losses[step] for step in range(1, recipe.total_steps + 1)]), nelbo, waits)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    made = Trainings(tmp_path_factory.mktemp("gpu"))
    yield made
    gc.collect()


def test_it_learns(trainings: Trainings) -> None:
    training = trainings("fp32")
    assert len(training.losses) == STEPS and np.isfinite(training.losses).all()
    assert training.end < 0.8 * training.losses[0]


@pytest.mark.parametrize("name", BF16)
def test_bf16_ends_where_fp32_does(trainings: Trainings, name: str, record_property: Callable[[str, object], None]) -> None:
    """On every engine, and compiled."""
    mine, right = trainings(name), trainings("fp32")
    parts = f"{mine.end / right.end - 1:+.1e} at the end, {mine.validation / right.validation - 1:+.1e} of validation"
    record_property("table", f"{name:18s} loss {mine.losses[0]:.4f} to {mine.end:.4f}; from fp32: {parts}")
    assert mine.losses[0] == pytest.approx(right.losses[0], rel=PRECISION), "initial weights and noise are the same"
    assert mine.end == pytest.approx(right.end, rel=PRECISION)
    assert mine.validation == pytest.approx(right.validation, rel=PRECISION)


def test_compiled_is_not_compiled(trainings: Trainings) -> None:
    mine, plain = trainings("compiled"), trainings("megatron")
    np.testing.assert_allclose(mine.losses, plain.losses, rtol=2 * PRECISION)
    assert mine.end == pytest.approx(plain.end, rel=SAME)


@pytest.mark.parametrize("name", ["megatron", "deepspeed zero 3"])
def test_continued_is_straight(trainings: Trainings, name: str) -> None:
    """Half of the steps, stop, and the other half from the checkpoint."""
    straight = trainings(name)
    folder = f"{name.replace(' ', '-')}-continued"
    trainings.train(folder, [*RUNS[name], f"training.steps={STEPS // 2}"])
    continued = trainings.train(folder, RUNS[name])
    np.testing.assert_allclose(continued.losses, straight.losses, rtol=4 * SAME)
    assert continued.end == pytest.approx(straight.end, rel=SAME)


@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_device(trainings: Trainings, name: str) -> None:
    waits = trainings(name).waits
    if REHEARSAL and name == "compiled":
        pytest.skip("reads of compiled code are not seen on CPU")
    assert waits.steps == STEPS - UNWATCHED_STEPS
    own = OWN_WAITS if name == "deepspeed zero 3" else ()
    ours = sorted({found for found in waits.found if not any(file in found for file in own)})
    assert not ours, "\n".join(ours)


def test_a_wait_is_seen() -> None:
    """Of what the test above relies on."""
    waits = Waits()
    with world():
        value = torch.ones(8, device=DEVICE)
        with waits.watching():
            doubled = value * 2
        assert not waits.found
        with waits.watching():
            doubled.sum().item()
        assert len(waits.found) == 1


def test_texts_are_the_same_with_the_cache_and_without(trainings: Trainings) -> None:
    """In fp32, on the device and on the CPU."""
    from bd3_scale.generation.generate import generate_tokens
    from bd3_scale.generation.load_model import load_network

    folder, texts = trainings("fp32").folder, []
    with world():
        for device, use_cache in ((DEVICE.type, True), (DEVICE.type, False), ("cpu", True)):
            loaded = load_network(folder, device=device)
            assert next(loaded.network.parameters()).dtype == torch.float32
            texts.append(generate_tokens(loaded, batch=2, length=64, seed=3, use_cache=use_cache, stop_at_end_of_text=False).tokens)
    assert all(len(row) == 64 for row in texts[0])
    for others in texts[1:]:
        for mine, other in zip(texts[0], others, strict=True):
            np.testing.assert_array_equal(mine, other)
