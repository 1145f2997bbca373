"""Conversations: a template's own text, cut into prompts and answers; and the rows that are made of them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data.chat import ChatTemplate
from bd3_scale.data.counted import ids
from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.preparation.prepare import Packing
from bd3_scale.data.preparation.prepare_corpus import Corpus, prepare_corpus
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.data.tokenizer_files import keep_what_is_told, write_tokenizer
from bd3_scale.errors import DataError, RecipeError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d "},
]


def chatty(folder: Path, template: object = CHATML) -> Tokenizer:
    """Bytes, and the tokens of ChatML; the end of text is the end of a message."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    return load_tokenizer(str(folder / "tokenizer.json"))


def test_every_answer_is_an_example_that_sees_nothing_behind_it(tmp_path: Path) -> None:
    plain = ChatTemplate(load_tokenizer("bytes")).examples(TURNS)
    first = "system: Be kind.\nuser: a?\nassistant: "
    assert plain == [(first, "b"), (f"{first}b\nuser: c?\nassistant: ", "d")]
    start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    template = ChatTemplate(chatty(tmp_path))
    assert template.examples(TURNS)[0] == (start, "b") and template.prompt(TURNS[:2]) == start
    assert template.examples(TURNS)[1][1] == "d ", "the end of text is packing's, blanks before it are the answer's"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (CHATML, TURNS[:2], "no message of the role 'assistant'"),
        (CHATML, [{"role": "user", "content": "<|im_end|>"}, TURNS[2]], "holds <|im_end|>, which is a token of its own"),
        ("{{ raise_exception('roles must alternate') }}", TURNS, "does not suit the chat template.*roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", TURNS, "does not suit the chat template.*unsafe"),
        ("{{ messages | length }}", TURNS, "does not put behind its prompt"),
        ("{% if %}", TURNS, "chat template cannot be read"),
    ],
)
def test_what_cannot_be_an_example_is_one_line(template: str, messages: list[dict[str, str]], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        ChatTemplate(chatty(tmp_path, template)).examples(messages)


def prepared(folder: Path, records: list[dict[str, object]], tokenizer: Tokenizer, kind: str, **how: object) -> np.ndarray:
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    packing = Packing(tokenizer, 48, kind=str(how.pop("packing", "document")), records=kind)
    asked = Corpus((str(corpus),), **{"held_out_last": 1, **how})  # type: ignore[arg-type]
    prepare_corpus(folder / "out", packing, asked, workers=1, progress=False)
    with ShardReader(folder / "out", "train", context=48, tokenizer=tokenizer) as reader:
        rows = reader.rows(range(len(reader)))
        assert (reader.counts(np.arange(len(rows))) == (rows[:, 1:] >= 0).sum(1)).all()
        assert reader.manifest.records == kind
    return rows


def test_prompts_do_not_count_and_answers_with_their_end_do(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    pairs = [("1+1=", "2"), ("", "hello"), ("a<|endoftext|>", "é"), ("held", "out")]
    rows = prepared(tmp_path, [{"prompt": one, "response": other} for one, other in pairs], tokenizer, "prompts")
    assert len(rows) == 3
    for row, (prompt, answer) in zip(rows, pairs, strict=False):
        first, second = list(prompt.encode()), list(answer.encode())
        given = [256, *(~token for token in first), *second, 256]
        assert row.tolist() == [*given, *[~256] * (48 - len(given))]


def test_conversations_become_the_ids_that_sampling_gives(tmp_path: Path) -> None:
    tokenizer = chatty(tmp_path / "tokenizer")
    turns = [*TURNS[1:3], *TURNS[1:3]]
    rows = prepared(tmp_path, [{"messages": turns[:2]}, {"messages": turns[:2]}], tokenizer, "messages")
    prompt = tokenizer.encode_chat([ChatTemplate(tokenizer).prompt(turns[:1])])[0]
    end = tokenizer.end_of_text
    assert rows[0, : len(prompt) + 3].tolist() == [end, *(~token for token in prompt), *tokenizer.encode("b"), end]
    assert (ids(rows[0]) == end).sum() > 2 and tokenizer.encode("<|im_end|>") != [end], "as a text it is only letters"


def test_the_template_goes_with_the_tokenizer(tmp_path: Path) -> None:
    """Into the folder of an imported run, and of an export."""
    tokenizer = chatty(tmp_path / "own", "{{ bos_token }}" + CHATML)
    config = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": {"content": "<|im_start|>"}}))
    for folder, keep in ((tmp_path / "run", keep_what_is_told), (tmp_path / "out", partial(write_tokenizer, context=8))):
        folder.mkdir()
        shutil.copyfile(tokenizer.name, folder / "tokenizer.json")
        keep(tokenizer, folder)
        copy = load_tokenizer(str(folder / "tokenizer.json"))
        asked = ChatTemplate(copy).prompt(TURNS[:2]), ChatTemplate(tokenizer).prompt(TURNS[:2])
        assert copy.fingerprint == tokenizer.fingerprint and (folder.name == "out" or asked[0] == asked[1])
        assert ChatTemplate(copy).source == ChatTemplate(tokenizer).source


def test_bad_records_are_named_or_left_out(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a"},
        {"prompt": "c", "response": "d"},
        {"prompt": "e", "response": "f"},
    ]
    with pytest.raises(DataError, match=r'corpus.jsonl: line 2 has no text under "prompt" and "response"; fix it'):
        prepared(tmp_path, records, load_tokenizer("bytes"), "prompts")
    assert len(prepared(tmp_path, records, load_tokenizer("bytes"), "prompts", skip_bad=1)) == 2
    with pytest.raises(RecipeError, match="set packing document"):
        prepared(tmp_path, records, load_tokenizer("bytes"), "prompts", packing="wrap")
