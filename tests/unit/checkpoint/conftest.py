"""Synthetic states and layouts: what real engines would hand over, without an engine, and worlds of threads that save and load."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_scale.checkpoint import store
from bd3_scale.checkpoint.fragments import Fragment, share
from bd3_scale.checkpoint.region import Region

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (13, 6),
    "layers.0.norm.weight": (7,),
    "layers.0.qkv.weight": (12, 5),
    "layers.0.output.weight": (8, 12),
    "layers.1.mixer.weight": (3, 6, 5),
    "layers.1.norm.weight": (7,),
    "temperature": (),
}
DIVIDED = {"embedding.weight": 0, "layers.0.qkv.weight": 0, "layers.0.output.weight": 1, "layers.1.mixer.weight": 1}
"""Tensor-parallel dimension of those that have one."""

Owned = list[tuple[str, Region]]
"""Canonical name and region, of one rank and one kind."""

RUN = {"interval": [0.45, 0.95], "wandb": "a1b2", "history": [{"step": 5, "variance": 0.1 + 0.2}], "text": "Grüße"}
RECIPE = "model:\n  hidden: 12\nrun:\n  name: prüfung\n"


def full_state(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, name) -> tensor of random bits, so that NaNs with payloads, infinities and subnormals occur."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for kind in KINDS:
        for name, shape in SHAPES.items():
            bits = torch.randint(-(2**31), 2**31, shape or (1,), generator=generator, dtype=torch.int64).to(torch.int32)
            state[kind, name] = bits.view(torch.float32).reshape(shape)
    return state


def fragments(owned: Owned, state: dict[tuple[str, str], torch.Tensor] | None) -> list[Fragment]:
    """Live fragments of a rank with the values of `state`, or zeros."""
    return [
        Fragment(kind, name, region, region.select(state[kind, name]).clone() if state is not None else torch.zeros(region.numel))
        for kind in KINDS
        for name, region in owned
    ]


def chunks(total: int, count: int) -> list[tuple[int, int]]:
    """ZeRO's division: equal lengths with padding at the end, so that late ranks may have little or nothing."""
    length = -(-total // count)
    return [(min(i * length, total), min((i + 1) * length, total)) for i in range(count)]


def rows(total: int, count: int) -> list[tuple[int, int]]:
    """(offset, size) of an even division."""
    bounds = [total * i // count for i in range(count + 1)]
    return [(bounds[i], bounds[i + 1] - bounds[i]) for i in range(count)]


def flat(regions: Owned, count: int) -> list[Owned]:
    """ZeRO 1 and 2: the regions end to end, cut into equal stretches."""
    ranks: list[Owned] = []
    for first, last in chunks(sum(region.numel for _, region in regions), count):
        position, mine = 0, []
        for name, region in regions:
            start, stop = max(first - position, 0), min(last - position, region.numel)
            if start < stop:
                mine.append((name, region.part(start, stop)))
            position += region.numel
        ranks.append(mine)
    return ranks


def whole(names: Sequence[str] = tuple(SHAPES)) -> Owned:
    return [(name, Region.whole(SHAPES[name])) for name in names]


def tensor(count: int, rank: int, names: Sequence[str] = tuple(SHAPES)) -> Owned:
    """Tensor parallelism: slices of the divided tensors, and a share of the others, which all ranks have."""
    mine = []
    for name in names:
        if name in DIVIDED:
            dim = DIVIDED[name]
            mine.append((name, Region.divided(SHAPES[name], dim, *rows(SHAPES[name][dim], count)[rank])))
    replicated = [Fragment("weight", name, region, torch.zeros(region.numel)) for name, region in whole(names) if name not in DIVIDED]
    return mine + [(fragment.name, fragment.region) for fragment in share(replicated, rank, count)]


def zero3(count: int) -> list[Owned]:
    """Every tensor on its own is divided over all ranks; the small ones leave ranks with empty regions."""
    return [
        [(name, Region.flat(shape, *chunks(region.numel, count)[rank])) for name, region in whole() for shape in [SHAPES[name]]]
        for rank in range(count)
    ]


STAGES = [[name for name in SHAPES if "layers.1" not in name], [name for name in SHAPES if "layers.1" in name]]

LAYOUTS: dict[str, list[Owned]] = {
    "one": [whole()],
    "flat2": flat(whole(), 2),
    "flat3": flat(whole(), 3),
    "flat4 backwards": flat(whole(list(reversed(SHAPES))), 4),
    "zero3 on 4": zero3(4),
    "tensor2": [tensor(2, rank) for rank in range(2)],
    "tensor3": [tensor(3, rank) for rank in range(3)],
    "tensor2 x flat2": [part for rank in range(2) for part in flat(tensor(2, rank), 2)],
    "pipeline2": [whole(stage) for stage in STAGES],
    "pipeline2 x tensor2": [tensor(2, rank, stage) for stage in STAGES for rank in range(2)],
}


class Member:
    """One rank of a world of threads."""

    def __init__(self, rank: int, world_size: int, box: list[Any], gate: threading.Barrier) -> None:
        self.rank, self.world_size, self._box, self._gate = rank, world_size, box, gate

    def all_gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._gate.wait()
        values = list(self._box)
        self._gate.wait()
        return values

    def barrier(self) -> None:
        self._gate.wait()


def in_world(size: int, action: Callable[[Member], Any]) -> list[Any]:
    """Run `action` as every rank at once; its results, or what it raised, in rank order. Fails where a rank never returns."""
    box: list[Any] = [None] * size
    results: list[Any] = [None] * size
    gate = threading.Barrier(size, timeout=20)

    def body(rank: int) -> None:
        try:
            results[rank] = action(Member(rank, size, box, gate))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save(folder: Path, layout: str = "flat2", step: int = 100, seed: int = 0, state: Any = None, run: Any = None) -> Path:
    """Save full_state(seed) in a layout by a world of threads."""
    values = state or full_state(seed)
    owned = LAYOUTS[layout]
    results = in_world(
        len(owned),
        lambda member: store.save(
            folder,
            step,
            fragments(owned[member.rank], values),
            samples_consumed=step * 8,
            run=RUN if run is None else run,
            recipe=RECIPE,
            communicator=member,
        ),
    )
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert len(set(results)) == 1
    return results[0]


def as_format_1(path: Path) -> None:
    """Write the index of a checkpoint anew as the first versions did: an entry for every part."""
    document, index = json.loads((path / "index.json").read_text()), store.Checkpoint(path).index
    document["format_version"] = 1
    del document["divisions"]
    for kind, names in index.tensors.items():
        for name, tensor in names.items():
            parts = []
            for part in tensor.parts:
                region = {field: getattr(part.region, field) for field in ("dim", "offset", "size", "start", "stop")}
                key = f"{kind}/{name}@{','.join(map(str, region.values()))}"
                parts.append({"file": part.file, "key": key, "region": region})
            document["tensors"][kind][name]["parts"] = parts
    del document["checksum"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "index.json").write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def holds(path: Path, seed: int = 0) -> bool:
    """A verified checkpoint has exactly the bits of full_state(seed)."""
    checkpoint = store.Checkpoint(path)
    checkpoint.verify_files()
    return all(same_bits(checkpoint.read(kind, name), value) for (kind, name), value in full_state(seed).items())


@pytest.fixture(scope="session")
def synthetic() -> Any:
    """This module."""
    return sys.modules[__name__]
