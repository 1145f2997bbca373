"""DeepSpeed's universal checkpoints as a source: one small torch file per parameter, opened without executing its pickle.

    global_step100_universal/zero/<parameter>/fp32.pt      {"param": the whole tensor, ...}

ZeRO's own folders are pickles of DeepSpeed's classes in shards of ranks: refused, with DeepSpeed's tools that convert them.
Invariant: only `fp32.pt` is read; moments stay behind, because the run that starts from these weights is another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from bd3_scale.convert.source import TorchFile
from bd3_scale.errors import CheckpointError

ZERO_FILES = ("*mp_rank_*_model_states.pt", "*zero_pp_rank_*_optim_states.pt", "global_step*/*_model_states.pt")


class UniversalFolder:
    """Parameters by the name of their folder; a file is mapped when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folders = sorted((path / "zero").rglob("fp32.pt"))
        self._files = {str(file.parent.relative_to(path / "zero")): file for file in folders if file.is_file()}
        if not self._files:
            raise CheckpointError(f"{path / 'zero'} holds no fp32.pt; name the folder that ds_to_universal.py wrote")
        self._shapes = {name: tuple(self._tensor(name).shape) for name in self._files}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def require(self, names: Iterable[str]) -> None:
        pass

    def read(self, name: str) -> torch.Tensor:
        return self._tensor(name).detach().float()

    def _tensor(self, name: str) -> torch.Tensor:
        content = TorchFile(self._files[name]).content
        tensor = content.get("param") if isinstance(content, dict) else None
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{self._files[name]} holds no tensor called param; write the universal checkpoint from ZeRO 1 or 2")
        return tensor


def is_universal(path: Path) -> bool:
    return (path / "zero").is_dir()


def refuse_zero(path: Path) -> None:
    """Raise CheckpointError for a folder of DeepSpeed's own shards; it says what makes them readable."""
    if path.is_dir() and any(True for pattern in ZERO_FILES for _ in path.glob(pattern)):
        raise CheckpointError(
            f"{path} holds DeepSpeed's ZeRO shards, which are pickles of its classes; where they are trusted, run the "
            "zero_to_fp32.py beside them, or deepspeed.checkpoint.ds_to_universal, and convert what it writes"
        )
