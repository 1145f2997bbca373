"""Zero-shot sets: the text that the rules restore, the rows that it becomes, and a cache that is never another text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data.preparation.zero_shot import lambada, one_billion_words, penn_treebank, scientific_paper, wikitext, zero_shot_rows
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.errors import DataError, RecipeError


@pytest.mark.parametrize(
    ("rules", "given", "wanted"),
    [
        (wikitext, " = = Early life = = \n", " == Early life ==\n"),
        (
            wikitext,
            'a 12 @,@ 5 @-@ year ( see [ 3 ] ) term , he said : " yes . " It \'s N m \n',
            'a 12,5-year (see [3]) term, he said: "yes." It\'s 1 m\n',
        ),
        (penn_treebank, "mr. <unk> does n't pay $ N N N on its firms ' 1\\/2", "mr. ? doesn't pay $1 1 1 on its firms' 1/2"),
        (
            one_billion_words,
            'He \'s at http : / / x.org , said " a friend " ( 3 / 4 ) for $ 5 .',
            'He\'s at http://x.org, said "a friend" (3/4) for $5.',
        ),
        (one_billion_words, "Did he go ? Yes ! I saw it ; he went home .", "Did he go? Yes! I saw it; he went home."),
        (lambada, " “Well,” she said ", '\n"Well," she said'),
        (scientific_paper, "we use ( a ) x @-@ rays , and it 's fine .", "we use (a) x-rays, and it's fine."),
    ],
)
def test_the_rules_restore_the_text(rules, given: str, wanted: str) -> None:  # type: ignore[no-untyped-def]
    assert rules(given) == wanted


def rows(name: str, source: Path, cache: Path, row_special: str = "bos_eos", context: int = 10) -> np.ndarray:
    found = zero_shot_rows(name, str(source), ByteTokenizer(), context=context, row_special=row_special, cache=cache)
    return found.rows(np.arange(len(found)))


def test_documents_follow_one_another_in_rows_with_the_specials_of_training(tmp_path: Path) -> None:
    """Whatever kind of file: 8 of 10 tokens of a row are text, an incomplete row is dropped, nothing is between documents."""
    sentences = ["it 's one", "it was n't two", "and three"]
    (tmp_path / "a.txt").write_text("".join(f" {line} \n\n" for line in sentences))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"sentence": line}) + "\n" for line in sentences))
    stream = b"it's one" + b"it wasn't two" + b"and three"
    for file in ("a.txt", "b.jsonl"):
        found = rows("ptb", tmp_path / file, tmp_path / "cache")
        assert found.shape == (len(stream) // 8, 10)
        assert (found[:, [0, -1]] == 256).all()
        assert bytes(found[:, 1:-1].ravel().tolist()) == stream[: len(stream) // 8 * 8]
    kept = rows("wikitext103", tmp_path / "a.txt", tmp_path / "cache", "none")
    assert bytes(kept.ravel().tolist()).startswith(b" it's one\n it was n't two\n")


def test_the_cache_is_used_and_never_another_text(tmp_path: Path) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("first text of some length\n")
    first = rows("ag_news", source, cache)
    (kept,) = cache.glob("*.npy")
    before = kept.stat().st_ino
    np.testing.assert_array_equal(rows("ag_news", source, cache), first)
    assert kept.stat().st_ino == before
    kept.write_bytes(kept.read_bytes()[:-1])  # cut
    np.testing.assert_array_equal(rows("ag_news", source, cache), first)
    source.write_text("other text of some length\n")
    assert not np.array_equal(rows("ag_news", source, cache), first)
    assert rows("ag_news", source, cache, context=12).shape[1] == 12 and len(list(cache.glob("*.npy"))) == 3


def test_what_cannot_be_a_set(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n")
    with pytest.raises(RecipeError, match="'wiki' is not known"):
        rows("wiki", tmp_path / "a.txt", tmp_path)
    with pytest.raises(DataError, match="too few for one row of 10"):
        rows("lm1b", tmp_path / "a.txt", tmp_path)
    with pytest.raises(DataError, match="no such file"):
        rows("lm1b", tmp_path / "b.txt", tmp_path)
