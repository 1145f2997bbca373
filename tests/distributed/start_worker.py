"""Measures what a rank holds at most while its engine is made: `start_worker.py PLAN.json OUT`, a list of [name, recipe, overrides].

The C library gives back at once what is freed, so that what is resident is what is held.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from bd3_scale import recipe as recipes
from bd3_scale.costs.state_memory import state_bytes
from bd3_scale.distributed import layout
from bd3_scale.engines.build import build_engine
from bd3_scale.launcher import launched
from bd3_scale.planning.cluster_plan import ClusterPlan
from bd3_scale.planning.devices import device_named
from bd3_scale.rules.validate import validate
from tests.distributed.worlds import results_of_ranks

VOCABULARY = 12288


def resident(kind: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most so far."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def held_after(recipe: recipes.Recipe, here: layout.Layout) -> tuple[int, int]:
    """Bytes of state that a rank has been given when its engine is made, and of whole weights that gloo, but not NCCL, copies to gather
    them in one piece. Moments come later; so do DeepSpeed's gradients, but under ZeRO 3 and of bf16 weights under ZeRO 1."""
    cluster = ClusterPlan(recipe, here.world_size, device_named("cpu", here.world_size), VOCABULARY)
    bf16, parallel = cluster.precision == "bf16", recipe.parallel
    state = state_bytes(
        recipe.model, recipe.training, recipe.parallel, cluster.stages_of(here.pipeline_rank), VOCABULARY, here.data, "cpu", bf16
    )
    at_once = parallel.resolved_engine == "megatron" or parallel.zero == 3 or (parallel.zero == 1 and bf16)
    copied = state.parameters if parallel.resolved_engine == "deepspeed" and parallel.zero in (1, 2) else 0
    return state.parameters + state.masters + (state.gradients if at_once else 0), copied


def _timeout(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def measure(path: str, overrides: list[str]) -> dict:
    recipe = recipes.load(path, overrides)
    validate(recipe, launched().world_size, "cpu")
    here = layout.start(recipe.parallel, "cpu")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is now
    before = resident("VmRSS")
    engine = build_engine(recipe, here, VOCABULARY, VOCABULARY - 1)
    most = resident("VmHWM") - before
    held = sum(master.untyped_storage().nbytes() for master in engine.masters)
    layer = 4 * (12 * recipe.model.hidden**2)
    elements = sum(place.numel for place in engine.slices if place.owned)
    timeouts = sorted({_timeout(group) for group in dist.distributed_c10d._world.pg_map})
    connected = sum(one.status == psutil.CONN_ESTABLISHED for one in psutil.Process().net_connections("tcp"))
    engine.close()
    state, copied = held_after(recipe, here)
    memory = {"most": most, "held": held, "state": state, "copied": copied, "layer": layer, "elements": elements}
    return {**memory, "timeouts": timeouts, "connected": connected}


def main() -> None:
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    results_of_ranks(measure, timeout=lambda item: recipes.load(*item[1:]).parallel.timeout)


if __name__ == "__main__":
    main()
