"""The `objective` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ObjectiveConfig:
    """What is trained. Source: Arriola et al. 2025 (arXiv 2503.09573), sections 3 and 4."""

    kind: str = "bd3"
    """bd3 (block diffusion)."""
    block_size: int = 16
    """L', tokens per block; divides model.context. 1 is autoregressive in the limit, model.context is plain masked diffusion."""
    interval: tuple[float, float] = (1e-3, 1.0)
    """[beta, omega]: training draws t ~ U[beta, omega]. Validation always uses U[1e-3, 1]."""
    clean_half: str = "block_causal"
    """How clean tokens see each other: block_causal | causal (inside a block, too)."""
    schedule: str = "linear"
    """Mask probability over time t: linear | cosine | square | sqrt | log. `interval` bounds t. The reported NELBO is always linear."""
