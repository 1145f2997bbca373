"""Prompts and answers in the files of a corpus: JSON lines with `messages`, or with `prompt` and `response`.

Of `prompt` and `response` the text is taken as it is, character for character; `messages` are written by the chat template (chat.py).
Invariants: as in `records`; the examples of one record lie on the same side of what is held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_scale.data.chat import ChatTemplate, messages_of
from bd3_scale.data.preparation.corpus import kind_of
from bd3_scale.data.preparation.records import LONGEST, BadRecords, json_records
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError

RECORDS = ("text", "prompts", "messages")
"""What a record of a corpus is: a text; `prompt` and `response`; `messages`."""


@dataclass(frozen=True)
class Example:
    """A prompt with its answer."""

    prompt: str
    answer: str
    record: str
    """What the record says, which decides whether it is held out."""


def examples(
    files: Iterable[Path], kind: str, tokenizer: Tokenizer, bad: BadRecords, longest: int = LONGEST
) -> Iterator[tuple[Example, int]]:
    """(example, bytes of the corpus read so far) of every record of `kind` prompts or messages. Raises DataError."""
    template = ChatTemplate(tokenizer) if kind == "messages" else None
    before = 0
    for path in files:
        if kind_of(path) != ".jsonl":
            raise DataError(f"{path}: {kind} are read from JSON lines alone; write an object a line")
        for record, number, read in json_records(path, bad, longest):
            try:
                found = _examples(record, template)
            except DataError as error:
                bad.add(path, f"line {number} {error}")
                continue
            for prompt, answer in found:
                bad.documents += 1
                yield Example(prompt, answer, f"{found[0][0]}{found[0][1]}"), before + read
        before += path.stat().st_size


def _examples(record: Any, template: ChatTemplate | None) -> list[tuple[str, str]]:
    if not isinstance(record, dict):
        raise DataError("is not an object")
    if template is not None:
        return template.examples(messages_of(record.get("messages")))
    prompt, response = record.get("prompt"), record.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str) or not response:
        raise DataError('has no text under "prompt" and "response"')
    return [(prompt, response)]
