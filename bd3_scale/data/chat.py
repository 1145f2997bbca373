"""Conversations as text: the chat template of a tokenizer, or a plain one, and what of it is prompt and what is answer.

A template is Jinja, as Hugging Face tokenizers have it: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`, beside the
`tokenizer.json`. It runs in Jinja's sandbox, which reaches neither files nor attributes of Python. A tokenizer without one has `PLAIN`.

Every answer of a conversation is an example of its own, whose prompt is all that comes before it: an answer never sees a later turn, in
no kind of objective and whatever the block size. Invariants: prompt and answer are the template's text up to the end of that answer,
without blanks and the end of text behind it (which packing puts there); sampling with the same messages has the same prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError, one_line
from bd3_scale.files import expanded

PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Of tokenizers without a template: a line for each message."""
ASSISTANT = "assistant"
Message = Mapping[str, str]
"""{role, content}."""


class ChatTemplate:
    """The template of `tokenizer`. Raises DataError where the files beside it cannot be read, or are no template.

    `source`: its Jinja, None where the tokenizer has none; `names`: of special tokens, as the template may use them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._tokenizer, self._end = tokenizer, tokenizer.token(tokenizer.end_of_text)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        self.source, self.names = self._beside()
        try:
            self._template = environment.from_string(PLAIN if self.source is None else self.source)
        except jinja2.TemplateError as error:
            raise DataError(f"{tokenizer.name}: its chat template cannot be read ({one_line(error, 200)}); mend or remove it") from None

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the assistant's answer follows. Raises DataError."""
        return self._rendered(messages, True)

    def examples(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """(prompt, answer) of each of the assistant's messages. Raises DataError where there is none, or where the template makes other
        text of the beginning of a conversation than of the whole."""
        found = []
        for place, message in enumerate(messages):
            for text in (message["role"], message["content"]):
                if (held := next((name for name in self._tokenizer.special_names if name in text), None)) is not None:
                    raise DataError(f"holds {held}, which is a token of its own to the tokenizer")
            if message["role"] == ASSISTANT:
                prompt, whole = self.prompt(messages[:place]), self._rendered(messages[: place + 1], False)
                if not whole.startswith(prompt):
                    raise DataError("has an answer that the chat template does not put behind its prompt")
                found.append((prompt, whole[len(prompt) :].rstrip().removesuffix(self._end)))
        if not found:
            raise DataError(f"has no message of the role {ASSISTANT!r}, so there is nothing to learn from it")
        return found

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(one) for one in messages], add_generation_prompt=add_generation_prompt, **self.names
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise DataError(f"does not suit the chat template ({one_line(error, 200)})") from None

    def _beside(self) -> tuple[str | None, dict[str, str]]:
        """The template that lies beside the tokenizer, and what it may call special tokens."""
        names = {"bos_token": self._end, "eos_token": self._end}
        folder = expanded(self._tokenizer.name).parent
        if self._tokenizer.name in ("gpt2", "bytes"):
            return None, names
        source: str | None = None
        try:
            if (config := folder / "tokenizer_config.json").is_file():
                document = json.loads(config.read_text("utf-8"))
                source = document.get("chat_template")
                for name, token in document.items():
                    content = token.get("content") if isinstance(token, dict) else token
                    if name.endswith("_token") and isinstance(content, str):
                        names[name] = content
            if (own := folder / "chat_template.jinja").is_file():
                source = own.read_text("utf-8")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{folder}: its chat template cannot be read ({one_line(error, 200)}); mend or remove it") from None
        if isinstance(source, list):  # several by name
            source = next((one["template"] for one in source if one.get("name") == "default"), None)
        return source, names


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def messages_of(record: Any) -> list[Message]:
    """The messages of what JSON has under "messages". Raises DataError."""
    if not isinstance(record, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str) for one in record
    ):
        raise DataError('has no list of messages with a text under "role" and "content"')
    return record
