"""The `checkpoint` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    """When the state is saved and how much of it is kept."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 3
    """Newest checkpoints kept; older ones are deleted. 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for ever. 0: none are."""
    fallback: bool = False
    """Where the newest checkpoint is damaged, continue from the newest older whole one and say so, instead of ending with an error."""
    asynchronous: bool = True
    """Training waits only for a copy of the state to host memory (which must have room for it); files are written meanwhile."""
    compare_replicas: bool = True
    """Each save compares a sum of the bits of the weights over the replicas, and is an error where a rank's differ: its memory, device or
    network corrupts data in silence."""
    patience: int = 3
    """Failed saves in a row (a full disk, no permission) that only warn; one more ends the run. The last save must succeed."""
    remote: str | None = None
    """A folder as fsspec names it (s3://bucket/run, gs://...) that every finished checkpoint is copied to, by every rank its own file. A
    run without local checkpoints continues from the newest one there (`run.resume=auto`), which all ranks fetch together."""
    remote_keep: int = 0
    """Newest checkpoints kept there; older ones are deleted, but for those of `keep_every`. 0: nothing is ever deleted there."""
