"""Sizes that the network, the engines and the formulas of a plan share: paddings, chunks and messages. Numbers only, without torch."""

from __future__ import annotations

SINUSOIDS = 256
"""Inputs of the embedding of noise levels."""

VOCABULARY_MULTIPLE = {"cpu": 1, "cuda": 128}
"""By device: ids per tensor rank are padded to a multiple of this. Matrix units want it, a CPU does not."""


def padded_vocabulary(vocabulary: int, tensor: int, multiple: int) -> int:
    """Ids with padding: every tensor rank gets the same number, a multiple of `multiple`."""
    return -(-vocabulary // (tensor * multiple)) * tensor * multiple


# -- Logits ------------------------------------------------------------------------------------------------------------

LOGITS_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
"""By device: logits alive at a time. 64 MB in fp32 keeps a CPU's caches useful, a GPU wants larger products."""
FUSED_CHUNKS = 2
"""Times as many where their gradient takes their place: less memory than the copies that it else has, and often one chunk."""


def positions_per_chunk(ids: int, device: str, fused: bool) -> int:
    """Positions that the head scores at a time; `ids`: of this tensor rank."""
    return max(64, LOGITS_CHUNK.get(device, LOGITS_CHUNK["cpu"]) * (FUSED_CHUNKS if fused else 1) // ids)


# -- Messages, in elements ---------------------------------------------------------------------------------------------

LARGEST_BUCKET = 200_000_000
"""Of DeepSpeed's reduce bucket, where the model has as many."""
PERSISTENT = 100_000
"""Up to which ZeRO-3 keeps a parameter whole on every rank (DeepSpeed's default)."""
SMALLEST_BUCKET = 1_000_000
"""Below which a collective of megatron-core's engine costs more for being one than for what it moves."""


def bucket_elements(elements: int, ranks: int) -> int:
    """Of gradients that megatron-core's engine reduces together, and weights that it gathers, of `elements` on this rank: an eighth,
    so that there is something to hide behind, but neither so few that links idle nor more than megatron-core's own choice."""
    return max(SMALLEST_BUCKET, min(elements // 8, max(40_000_000, 1_000_000 * ranks)))
