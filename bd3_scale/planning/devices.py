"""What a plan needs to know of the devices that a run is planned for: memory, arithmetic, how fast they reach each other, and what
kernels reach of all that.

Peaks are those of `costs/flops.py`, under the name that CUDA reports. Bandwidths are of one device, one way, as the data sheets
have them; what a collective reaches of them is `EFFICIENCY`, what kernels reach is the `Reached` of each device: the one place for
such numbers, each with its source. A cluster that is built otherwise is described by the options of the command
(`--gpus-per-node`, `--network`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil

from bd3_scale.costs.flops import peak_flops
from bd3_scale.errors import RecipeError

EFFICIENCY = 0.8
"""Of a link's bandwidth that collectives of large tensors are assumed to reach."""
RESERVE = 2 * 2**30
"""Bytes per device that are not the program's to use: the CUDA context, NCCL's buffers, cuBLAS workspaces."""
FRAGMENTATION = 0.05
"""Of the memory that the caching allocator cannot use because its free pieces lie apart."""


@dataclass(frozen=True)
class Reached:
    """What kernels reach of a device's limits, as shares; and what the host needs to start them, in seconds. `tools/benchmark.py limits`
    measures `product`, `memory`, `sdpa` and FlexAttention's product of `flash` and `flex` on the device at hand.

    Attention has two pairs: for heads of up to 64 and for wider ones, each forward and backward; its FLOPs are those of the tiles that
    are visited, 2.5 times as many in the backward (which computes the scores again).
    """

    product: float
    """Of the peak, by the best product of any shape; what its operands cost beside is counted (`limits.py`)."""
    memory: float
    """Of the memory's bandwidth, by kernels that stream."""
    flash: tuple[tuple[float, float], tuple[float, float]]
    """Of the peak, by FlashAttention 2 at 1,024 keys a query, from which FlexAttention's follows."""
    sdpa: tuple[tuple[float, float], tuple[float, float]]
    """Of the peak, by what `scaled_dot_product_attention` chooses there (no mask, or causal)."""
    flex: tuple[float, float] = (0.9, 0.85)
    """Of FlashAttention 2, forward and backward, by FlexAttention: He et al., "FlexAttention", PyTorch blog, August 2024."""
    launch: float = 16e-6
    """Seconds of the host for a kernel, with autograd's share."""
    layer: tuple[float, float] = (2.15e-3, 0.68e-3)
    """Seconds of the host for a layer beside its kernels, forward and backward: eager, compiled. These three are fitted to four times of
    a 2.5 GHz Xeon with kernels that do nothing (68, 90, 24.5 and 33 ms: 110M and 1.3B, eager and compiled), and meet them within 5 %."""


@dataclass(frozen=True)
class Device:
    name: str
    type: str
    """cuda | cpu: what a recipe is validated for."""
    reported: str
    """Its name as CUDA reports it: the key to its peak."""
    memory: int
    """Bytes."""
    per_node: int
    inside: float
    """Bytes/s between two devices of a node, one way."""
    outside: float
    """Bytes/s from a device to another node."""
    bandwidth: float
    """Bytes/s of its own memory."""
    reached: Reached

    def peak(self, precision: str) -> float:
        """FLOP/s in bf16 or fp32."""
        found = CPU_PEAK if self.type == "cpu" else peak_flops(self.reported, precision)
        assert found is not None, "the table holds devices whose peaks are known"
        return found

    @property
    def usable(self) -> int:
        """Bytes that a rank may hold."""
        return self.memory if self.type == "cpu" else int(self.memory * (1 - FRAGMENTATION)) - RESERVE


CPU_PEAK = 80e9
"""FLOP/s of one core in fp32: two fused multiply-adds of 8 lanes at 2.5 GHz (AVX2, from the Haswell generation on)."""

# Products: the best shape of mamf-finder (Bekman, "Machine Learning Engineering", table of maximum achievable matmul FLOPS): 271 of 312,
# 794 of 989 and 1,745 of 2,250 TFLOP/s; He's tuned product on an H100 has 780. Memory: 2.8 of 3.35 TB/s assumed in a calculation for the
# H100, not yet measured, and the same share on others.
# Attention on the H100: Shah et al. 2024 ("FlashAttention-3"), figures 5 and 6, L = 1,024, not causal: FlashAttention 2 reaches
# 306/238 (d = 64) and 350/260 TFLOP/s (d = 128), cuDNN, which torch chooses there, 373/348 and 574/408.
_H100 = Reached(
    product=0.80,
    memory=0.84,
    flash=((306 / 989, 238 / 989), (350 / 989, 260 / 989)),
    sdpa=((373 / 989, 348 / 989), (574 / 989, 408 / 989)),
)
# Measured, from kernels of steps of owt_1b and owt_110m (benchmarks/2026-11-27-h200.md): FlexAttention of L' = 16 on its tiles (so `flash`
# is its own here), cuDNN at L = 1,024, products with what they move, and all elementwise kernels together, the eager ones among them.
_H200 = Reached(
    product=0.83,
    memory=0.66,
    flash=((0.16, 0.19), (0.24, 0.215)),
    sdpa=((0.38, 0.185), (0.53, 0.37)),
    flex=(1.0, 1.0),
)
# Dao 2023 ("FlashAttention-2"), figures 5 and 6, A100, L = 1,024, not causal: read off to some per cent; torch takes the same kernel.
_FLASH_A100 = ((0.53, 0.42), (0.62, 0.50))
_A100 = Reached(product=0.87, memory=0.84, flash=_FLASH_A100, sdpa=_FLASH_A100)
# Attention of the B200: nothing published for these shapes with torch's kernels; the shares of the H100.
_B200 = replace(_H100, product=0.775)
# oneDNN and torch's CPU kernels in fp32 on a core that shares some 20 GB/s; `benchmarks/*-step.md` has measured steps.
_CPU = Reached(product=0.8, memory=0.8, flash=((0.5, 0.5),) * 2, sdpa=((0.5, 0.5),) * 2, flex=(1.0, 1.0), launch=2e-6, layer=(0.0, 0.0))

DEVICES = {
    device.name: device
    for device in (
        # Memory: what CUDA reports, rounded down. NVIDIA A100 data sheet (2021): NVLink 600 GB/s both ways together; DGX A100 (2020):
        # 8 x 200 Gb/s InfiniBand; 1,555 and 2,039 GB/s of memory.
        Device("a100-40", "cuda", "NVIDIA A100-SXM4-40GB", 39 * 2**30, 8, 300e9, 25e9, 1.555e12, _A100),
        Device("a100-80", "cuda", "NVIDIA A100-SXM4-80GB", 79 * 2**30, 8, 300e9, 25e9, 2.039e12, _A100),
        # NVIDIA H100 (2022) and H200 (2023) data sheets: NVLink 900 GB/s both ways together, 3.35 and 4.8 TB/s of memory; DGX H100:
        # 8 x 400 Gb/s InfiniBand.
        Device("h100", "cuda", "NVIDIA H100 80GB HBM3", 79 * 2**30, 8, 450e9, 50e9, 3.35e12, _H100),
        Device("h200", "cuda", "NVIDIA H200", 139 * 2**30, 8, 450e9, 50e9, 4.8e12, _H200),
        # NVIDIA DGX B200 data sheet (2024): 14.4 TB/s NVLink, 1,440 GB and 64 TB/s of memory of 8 GPUs, 8 x 400 Gb/s InfiniBand.
        Device("b200", "cuda", "NVIDIA B200", 178 * 2**30, 8, 900e9, 50e9, 8e12, _B200),
        # This machine, shared by its ranks (memory: `device_named`). gloo over the loopback interface moves about 1 GB/s.
        Device("cpu", "cpu", "", 0, 1_000_000, 1e9, 1e9, 10e9, _CPU),
    )
}


def device_named(name: str, world_size: int, per_node: int | None = None, network: float | None = None) -> Device:
    """The device of the table; `per_node` devices in a node, `network` bytes/s from each to other nodes. Raises RecipeError."""
    if name not in DEVICES:
        raise RecipeError(f"--device {name} is not in the table of devices; set one of {', '.join(DEVICES)}")
    device = DEVICES[name]
    if device.type == "cpu":
        device = replace(device, memory=psutil.virtual_memory().total // world_size)
    return replace(device, per_node=per_node or device.per_node, outside=network or device.outside)
