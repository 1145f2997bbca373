"""A tiny model trained by the OWT recipe's packing writes texts longer than L in more than half of 40 samples.

Documents end after a geometric number of tokens, 4 L in the mean, so that 78 % are longer than L. With `data.row_special=none` (the
paper's OpenWebText) rows are cut from the stream of documents, the model learns how rarely a text ends, and texts go on past a row. With
`bos_eos` (the paper's LM1B) every row ends with an end of text, the model learns that as well, and no text is longer than a row. Seeds are
given; measured with seeds 0 to 3: 36, 33, 30 and 35 of 40 texts are longer than L with none, and 0 with bos_eos.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bd3_scale.data.preparation.packing import Document
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.generation.generate import generate_tokens
from bd3_scale.generation.load_model import load_network
from tests.distributed.launch import launch

LENGTH, SAMPLES = 32, 40
RECIPE = """
run: {name: lengths, dir: unset, device: cpu, threads: 1}
model: {context: 32, layers: 2, hidden: 32, heads: 4, dropout: 0.0, initial_std: 0.18}
objective: {block_size: 8}
data: {path: unset, tokenizer: bytes, window: 2}
training: {steps: 200, global_batch: 32, learning_rate: 5.0e-3, warmup: 20, ema: 0.9}
validation: {every: 0, rows: 64}
parallel: {micro_batch: 32}
checkpoint: {every: 0}
tracking: {every: 100, plots: false, sample_tokens: 0}
"""


@pytest.fixture(scope="module")
def runs(world_of_one: object, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a run on each packing of the same documents."""
    folder, tokenizer, random = tmp_path_factory.mktemp("lengths"), load_tokenizer("bytes"), np.random.Generator(np.random.Philox(1))
    documents = [
        Document(f"{number}", np.array(tokenizer.encode("".join(random.choice(list("abcd"), length)))), held_out=number % 10 == 0)
        for number, length in enumerate(random.geometric(1 / (4 * LENGTH), 1500).tolist())
    ]
    recipe, made = folder / "recipe.yaml", {}
    recipe.write_text(RECIPE)
    for special in ("none", "bos_eos"):
        data, run = folder / f"data-{special}", folder / special
        prepare(data, Packing(tokenizer, LENGTH, row_special=special), "tests", None, lambda: documents)
        overrides = [f"data.path={data}", f"data.row_special={special}", f"run.dir={run}"]
        finished = launch(1, ["-m", "bd3_scale.train", str(recipe), *overrides], folder / f"{special}.log")
        assert finished.status == 0, finished.output[-4000:]
        made[special] = run
    return made


def longer(run: Path) -> int:
    """Samples, of up to five rows, that are longer than a row; the token that begins a text is none of its tokens."""
    result = generate_tokens(load_network(run), batch=SAMPLES, length=5 * LENGTH, seed=0)
    return sum(len(tokens) - 1 > LENGTH for tokens in result.tokens)


def test_texts_of_a_stream_go_on_past_a_row(runs: dict[str, Path]) -> None:
    assert longer(runs["none"]) > SAMPLES // 2


def test_texts_of_rows_that_end_do_not(runs: dict[str, Path]) -> None:
    assert longer(runs["bos_eos"]) <= 2
