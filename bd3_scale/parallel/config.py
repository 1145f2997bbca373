"""The `parallel` section of a recipe: the layout (tensor, pipeline, context, data, zero) and the micro-batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ParallelConfig:
    """How the ranks share the work. The data-parallel size is what is left of the world: world / (tensor x pipeline)."""

    tensor: int = 1
    """Ranks that share every layer: heads, MLP, vocabulary. Keep them on one node."""
    pipeline: int = 1
    """Stages that share the layers."""
    virtual_stages: int = 1
    """Slices of the layers per stage: above 1, the interleaved schedule, whose bubble is that much smaller."""
    stage_layers: list[int] | None = None
    """Layers of each of the pipeline x virtual_stages slices, in order; null: by cost (first embeds, last has the head)."""
    context: int = 1
    """Ranks that share a row. Only 1 in this version."""
    zero: int = 1
    """ZeRO stage 0-3: nothing | optimizer | + gradients | + weights divided over the data-parallel ranks."""
    engine: str = "auto"
    """Who divides and reduces: deepspeed (one pipeline stage) | megatron (megatron-core, ZeRO 0 and 1) | fsdp (torch's fully_shard, ZeRO 2
    and 3) | auto: megatron for ZeRO 0 and 1, for 2 and 3 deepspeed at one stage and fsdp at several, or where layers are compiled under
    ZeRO 3. Changes no result."""
    shard: int | None = None
    """Data-parallel ranks that share one copy of what ZeRO divides; the others replicate it (HSDP). null: all of them."""
    sequence: bool = False
    """Sequence parallelism (needs tensor > 1): norms, dropout and residuals divided over the tensor ranks along the rows."""
    micro_batch: int | None = 1
    """The most rows per forward on one replica; its share of training.global_batch is computed in as few forwards as that allows, of
    equally many rows (data/shares.py). null: the whole share at once."""
    timeout: int = 1800
    """Seconds after which a collective that does not finish is an error."""
    hang: int = 20
    """Times the longest step, save or validation that the run has known, two minutes at least: a rank whose main thread does nothing
    for so long is a hang, and ends the job (runtime/watchdog.py). 0: only `timeout` counts."""
    heartbeat: int = 30
    """Seconds of silence after which a rank counts as dead and the whole job ends with its name (runtime/guard.py). Independent of
    how long a step takes; a rank that is killed on a host where others live is noticed within a second or so."""

    @property
    def resolved_engine(self) -> str:
        """deepspeed | megatron | fsdp: what `engine` = auto stands for in this layout."""
        if self.engine != "auto":
            return self.engine
        if self.zero <= 1:
            return "megatron"
        return "deepspeed" if self.pipeline == 1 else "fsdp"
