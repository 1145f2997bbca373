"""All-gathers of updated weights behind the next forward: begun after the step, waited for where a part of the network needs them.

ZeRO 1 leaves every data-parallel rank with its share of the new weights. All buckets are sent on their way at once, those that the
forward needs first, first; embedding, blocks and head wait for theirs when the forward comes to them. Waiting is outside of the blocks,
which are compiled together with their hooks: for blocks where the network goes from one to the next, for the rest in a hook before it.

Invariants: no part computes before its weights are there, in training as in validation; nobody writes the weights or the fp32 masters
(which are views of them in fp32) while a gather may read them (`finish`); a forward waits for every bucket, or the engine fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from bd3_scale.model.transformer import Transformer

AROUND = ("embedding", "positions", "condition", "final_norm", "final_modulation", "head")
"""Parts of a network beside its blocks."""


class Gathers:
    """Of one rank's chunks, each a megatron-core DistributedDataParallel around a transformer."""

    def __init__(self, chunks: Sequence[Any], transformers: Sequence[Transformer]) -> None:
        # Buckets are made in the order of the backward.
        self._buckets: list[Any] = [bucket for chunk in chunks for bucket in reversed(chunk.bucket_groups)]
        self._transformers = transformers
        self._hooks: list[Any] = []
        for chunk, transformer in zip(chunks, transformers, strict=True):
            chunk.disable_forward_pre_hook(param_sync=False)  # megatron-core's own are in every module
            self._wait_in(transformer, chunk.param_to_bucket_group)

    @property
    def under_way(self) -> bool:
        return any(bucket.param_gather_handle is not None for bucket in self._buckets)

    def start(self) -> None:
        for bucket in self._buckets:
            bucket.start_param_sync()

    def finish(self) -> None:
        """Wait for all that is under way."""
        _wait(self._buckets)

    def close(self) -> None:
        """Wait, and let go of the networks."""
        self.finish()
        for hook in self._hooks:
            hook.remove()
        for transformer in self._transformers:
            transformer.__dict__.pop("_layers", None)

    def _wait_in(self, transformer: Transformer, bucket_of: dict[nn.Parameter, Any]) -> None:
        def needed_by(part: nn.Module) -> list[Any]:
            return list(dict.fromkeys(bucket_of[parameter] for parameter in part.parameters()))

        for name in AROUND:
            part = getattr(transformer, name, None)
            if part is not None:
                buckets = needed_by(part)
                self._hooks.append(part.register_forward_pre_hook(lambda *unused, buckets=buckets: _wait(buckets)))
        layers, of_block = transformer._layers, {block: needed_by(block) for block in transformer.blocks.values()}

        def waited_for() -> Iterator[tuple[nn.Module, bool]]:
            for block, is_last in layers():
                _wait(of_block[block])
                yield block, is_last

        transformer._layers = waited_for  # type: ignore[method-assign]


def _wait(buckets: Iterable[Any]) -> None:
    for bucket in buckets:
        if bucket.param_gather_handle is not None:
            bucket.param_gather_handle.wait()
            bucket.param_gather_handle = None
