"""Errors a user can fix: one line that names what is wrong and what to do about it.

Invariant: whatever a user can cause (a recipe, a data folder, a checkpoint, a world size) raises a `UserError`;
the commands print its text without a traceback and leave with `exit_code`. Anything else is a defect of ours.
No error shows what gives access: credentials inside URLs are blotted out, also where a library's own text quotes them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Base of all errors that name a cause and a cure. `exit_code` is the status the command leaves with."""

    exit_code = 1
    shared = False
    """All ranks raise the same, so that one voice a host is enough; see `on_all_ranks`."""

    def __init__(self, *texts: Any) -> None:
        super().__init__(*map(without_credentials, texts))

    def say(self, program: str = "bd3_scale", where: str = "") -> int:
        """Print the line that a command leaves with, `where` in front of its text; returns the exit status."""
        print(f"{program}: error: {where}{self}", file=sys.stderr, flush=True)
        return self.exit_code


def without_credentials(value: Any) -> Any:
    """A copy without user:password@ and ?signature in URLs, wherever they stand in a text, a list or a mapping."""
    if isinstance(value, dict):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_credentials(item) for item in value)
    if isinstance(value, str) and "://" in value:
        blotted = re.sub(r"://([^/?\s'\"]*|[^/?\s'\"@:]+:[^\s'\"@]*)@", "://***@", value)  # a password may hold a slash
        return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]+", r"\1?***", blotted)
    return value


@contextmanager
def on_all_ranks() -> Iterator[None]:
    """Around what raises the same error on every rank or on none."""
    try:
        yield
    except UserError as error:
        error.shared = True
        raise


class RecipeError(UserError):
    """A recipe or an override that cannot work; found before any process group exists."""

    exit_code = 2


class DataError(UserError):
    """A data folder, shard, manifest or tokenizer that is missing, damaged or made for something else."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged, or of another model."""


class TrainingError(UserError):
    """A run that cannot go on: a non-finite loss, ranks that disagree."""


def one_line(text: object, most: int | None = None) -> str:
    """A text, or an error's, with its lines and runs of spaces joined: at most `most` characters."""
    return " ".join(str(text).split())[:most]
