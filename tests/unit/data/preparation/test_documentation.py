"""The corpus is prose, the same every time, within its budget and never executed; what is held out does not stand in the training text."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale.data.preparation import documentation as module
from bd3_scale.data.preparation import packing
from bd3_scale.data.preparation.documentation import documentation, paragraphs, read_module, source_files, unseen
from bd3_scale.data.tokenizer import ByteTokenizer, load_tokenizer


def test_only_prose_is_kept() -> None:
    text = """Compute the *arithmetic* mean of :class:`~torch.Tensor` along ``axis``.

    Lines of a paragraph
    are joined into one line, and whitespace is   normalised.

    .. math:: x = \\\\frac{1}{2}

    .. note:: This one is kept because it is a sentence.

    Example of how this function is used in real code::

        x = mean(array, axis=0)

        this is a very long sentence that still belongs to the code.

    >>> mean([1, 2, 3])
    2.0

    =====  =====
    first  second
    =====  =====

    ```python
    a fenced block of many plain words that is not prose at all
    ```

    Parameters
    ----------
    a : array_like
        The array whose mean is to be computed.
    axis : int
        The axis along which the means are computed.
    """
    assert paragraphs(text) == [
        "Compute the arithmetic mean of torch.Tensor along axis.",
        "Lines of a paragraph are joined into one line, and whitespace is normalised.",
        "This one is kept because it is a sentence.",
        "Example of how this function is used in real code",
        "Parameters\na : array_like The array whose mean is to be computed.\naxis : int The axis along which the means are computed.",
    ]


def test_a_sentence_is_taken_once_whatever_it_names() -> None:
    seen: set[bytes] = set()
    first = "Returns the configuration of the LlamaModel as a dictionary with 12 entries."
    assert unseen(first, seen) == first
    assert unseen("returns the configuration of the MistralModel as a dictionary, with 7 entries", seen) == ""
    listed = "Args:\nfirst: the value that is returned when nothing else is there\n" + first
    assert unseen(listed, seen) == "Args:\nfirst: the value that is returned when nothing else is there"
    assert unseen(listed, seen) == ""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty modules that repeat one another's docstrings, and that must not be executed."""
    for number in range(40):
        letters = "".join(chr(97 + (number // 26**place) % 26) for place in range(2))
        own = [
            f"The {letters} function number {word} returns a value that the caller of it may use."
            for word in ("one", "two", "three", "four")
        ]
        shared = [
            f"Every module says that the {word} argument is checked before it is used." for word in ("first", "second", "third", "last")
        ]
        functions = "".join(f'def f{place}():\n    """{text}"""\n' for place, text in enumerate(own + shared))
        (tmp_path / f"m{number:02}.py").write_text(f"{functions}\nraise SystemExit('executed')\n")
    (tmp_path / "broken.py").write_text('"""' + "A docstring of a file that does not parse at all. " * 20 + '"""\ndef (')
    (tmp_path / "latin.py").write_bytes(b'"""\xe9' + b"A docstring in another encoding than it says. " * 20 + b'"""')
    monkeypatch.setattr(module, "source_files", lambda: iter(sorted((path.stem, path) for path in tmp_path.glob("*.py"))))
    monkeypatch.setattr(module, "held_out", lambda name: packing.held_out(name, 0.4))
    return tmp_path


def test_held_out_text_does_not_stand_in_the_training_text(library: Path) -> None:
    tokenizer = ByteTokenizer()
    documents = documentation(tokenizer, 10**6, progress=False)
    split = {side: [tokenizer.decode(d.tokens) for d in documents if d.held_out is side] for side in (False, True)}
    assert len(split[True]) > 5 and len(split[False]) > 5 and len(documents) == 40
    train = {paragraph for text in split[False] for paragraph in text.split("\n\n")}
    assert not [paragraph for text in split[True] for paragraph in text.split("\n\n") if paragraph in train]
    assert sum(text.count("Every module says that the first argument") for text in split[True] + split[False]) == 1


def test_a_budget_is_kept(library: Path) -> None:
    tokenizer = ByteTokenizer()
    everything = sum(len(document.tokens) + 1 for document in documentation(tokenizer, 10**6, progress=False))
    for budget in (0, 1000, everything - 1, everything):
        used = sum(len(document.tokens) + 1 for document in documentation(tokenizer, budget, progress=False))
        assert max(0, budget - 1000) <= used <= budget or used == everything == budget


def test_the_corpus_of_this_machine() -> None:
    """Standard library only, for speed: twice the same, English, split by whole modules, and no paragraph on both sides."""
    tokenizer = load_tokenizer("gpt2")
    first, second = (documentation(tokenizer, 150_000, progress=False) for _ in range(2))
    assert [d.name for d in first] == [d.name for d in second] and all(
        (a.tokens == b.tokens).all() for a, b in zip(first, second, strict=True)
    )
    assert 140_000 < sum(len(document.tokens) + 1 for document in first) <= 150_000
    assert all(document.held_out == packing.held_out(document.name) for document in first)
    texts = {side: [tokenizer.decode(d.tokens) for d in first if d.held_out is side] for side in (False, True)}
    train = {paragraph for text in texts[False] for paragraph in text.split("\n\n")}
    assert texts[True] and not [paragraph for text in texts[True] for paragraph in text.split("\n\n") if paragraph in train]
    words = " ".join(texts[False]).lower().split()
    assert 0.04 < words.count("the") / len(words) < 0.1  # as English has it


def test_files_are_read_in_a_fixed_order_without_tests_and_copies() -> None:
    files = list(source_files())
    names = [name for name, _ in files]
    assert names.index("abc") < names.index("torch.nn.functional") < names.index("numpy.ma.core")
    assert not [name for name in names if {"tests", "test", "_vendor", "oci"} & set(name.split(".")[:-1])]
    topics = dict(files)["pydoc_data.topics"]
    modules = read_module("pydoc_data.topics", topics)
    assert len(modules) > 60 and all(entry.name.startswith("pydoc_data.topics.") for entry in modules)


def test_text_attached_to_compiled_functions_is_read(tmp_path: Path) -> None:
    source = tmp_path / "docs.py"
    source.write_text(
        'add_docstr(torch.abs, r"""\nThe absolute value of each element, computed on the device of the input.\n""".format(**common))\n'
        'class A:\n    """One."""\n    if True:\n        def f(self):\n            """Two."""\n'
        '    else:\n        async def g(self):\n            """Three."""\n'
    )
    assert read_module("docs", source)[0].docstrings == [
        "\nThe absolute value of each element, computed on the device of the input.\n", "One.", "Two.", "Three."
    ]  # fmt: skip
