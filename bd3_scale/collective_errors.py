"""The few things the checkpoint code asks of the other ranks, and how an error on one becomes the same error on all.

The format code knows no process group: it is handed anything with `rank`, `world_size`, `all_gather` and `barrier`
(bd3_scale.distributed.layout.Layout, or `Solo`). Invariant: between two collectives every rank either succeeds or reports, so
no rank waits for one that has failed, and all ranks raise the same line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from bd3_scale.errors import CheckpointError, one_line

Result = TypeVar("Result")


class Communicator(Protocol):
    """What saving and loading need of the world. `all_gather` returns every rank's value in rank order, on every rank."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, value: Any) -> list[Any]: ...

    def barrier(self) -> None: ...


class Solo:
    """A world of one process."""

    rank = 0
    world_size = 1

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None


def together(communicator: Communicator, action: Callable[[], Result], explain: Callable[[BaseException], str]) -> list[Result]:
    """Run `action` on every rank; return all results in rank order, or raise one CheckpointError, the same on every rank.

    `explain` turns whatever was raised (a full disk, a defect) into the line to show; a CheckpointError is shown as it is.
    The rank that failed keeps the original as the cause.
    """
    result: Result | None = None
    failure: Exception | None = None
    message: str | None = None
    try:
        result = action()
    except CheckpointError as error:
        failure, message = error, str(error)
    except Exception as error:  # whatever it is, the other ranks must hear of it instead of waiting for this one
        failure, message = error, one_line(explain(error))
    answers = communicator.all_gather((message, result))
    messages = [message for message, _ in answers if message is not None]
    if messages:
        raise CheckpointError(messages[0]) from failure
    return [result for _, result in answers]
