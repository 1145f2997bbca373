"""Counts the bytes that operations make and that something still holds: autograd's graph, a closure, a buffer, whoever.

Python's garbage collector does not see what only a graph holds; a weak reference to a storage does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """While it is on, remembers the storage of every result; `known`: tensors that were there before, views of which do not count."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.known = {_local(tensor).untyped_storage().data_ptr() for tensor in known}
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                storage = _local(one).untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self.known and storage._cdata not in self.storages:
                    self.storages[storage._cdata] = StorageWeakRef(storage)
        return result

    def bytes(self) -> int:
        """Held now."""
        # A storage may have been emptied, or filled, in place since; and it may go between two lines here, for a thread of gloo's has it.
        living = {key: torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for key, reference in self.storages.items()}
        self.storages = {key: value for key, value in self.storages.items() if living[key] is not None}
        return sum(storage.nbytes() for storage in living.values() if storage is not None)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What a distributed tensor has on this rank."""
    return getattr(tensor, "_local_tensor", tensor)
