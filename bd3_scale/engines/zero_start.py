"""A start under DeepSpeed with a network that has no weights yet; under ZeRO 3 no rank ever holds it.

DeepSpeed has the first rank broadcast every weight; here nobody has any. The network was made on the host without being filled, and
memory that nobody writes costs nothing. Under ZeRO 3 each parameter gets room on the device, is divided, and gives the room back.
Every rank then fills its own masters (`Engine.initialise`).

Invariant: `deepspeed.initialize` finds the parameters divided as it would have divided them itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn


def divide(module: nn.Module, config: dict[str, Any], dtype: torch.dtype, mpu: Any) -> None:
    """Over the data-parallel ranks; `config` and `mpu` as for `deepspeed.initialize`."""
    from deepspeed.runtime.zero.partition_parameters import Init

    class Divided(Init):  # type: ignore[misc]
        def _convert_to_zero_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
            for parameter in dict.fromkeys(parameters):
                parameter.data = torch.empty(parameter.shape, dtype=dtype, device=self.local_device)
                self._convert_to_deepspeed_param(parameter)
                parameter.partition()  # type: ignore[attr-defined]

    Divided(module, data_parallel_group=parallel_state.get_data_parallel_group(), dtype=dtype, config_dict_or_path=config, mpu=mpu)


@contextmanager
def without_broadcast() -> Iterator[None]:
    """While `deepspeed.initialize` runs: no rank has weights that others want."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda self: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = broadcast
