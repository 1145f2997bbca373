"""Judges: each token of a text once, given what came before; a `transformers` directory and our own checkpoints alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from bd3_scale.distributed.layout import Layout
from bd3_scale.errors import CheckpointError, RecipeError
from bd3_scale.evaluation.judge import load_judge, text_nll

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [2, 3, 8, 9, 100])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 30])
def test_every_token_is_scored_once_whatever_the_window(window: int, length: int) -> None:
    """A bigram model needs one token of context, which every window has."""
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = torch.randint(5, (length,), generator=torch.Generator().manual_seed(2))
    seen: list[int] = []

    def logits(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return table[part]

    expected = -table.log_softmax(-1)[tokens[:-1], tokens[1:]]
    torch.testing.assert_close(text_nll(logits, tokens, window), expected)
    assert all(size <= window for size in seen)


def test_the_context_of_a_token_is_at_least_half_a_window() -> None:
    """A model that tells how many tokens it was given: log p(0) grows with them."""

    def logits(part: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.arange(1.0, len(part) + 1), torch.zeros(len(part))], dim=1)

    nll = text_nll(logits, torch.zeros(40, dtype=torch.int64), 8)
    given = (torch.expm1(nll)).reciprocal().log()  # nll = log(1 + e^-k) after k tokens
    assert torch.allclose(given[:7], torch.arange(1.0, 8.0, dtype=torch.float64))
    assert given[7:].min().round() >= 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two words' worth of parameters, as `transformers` saves it."""
    prepare_torchvision()
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("judge")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=4, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_transformers_directory_judges_by_its_own_tokens(directory: Path) -> None:
    import transformers

    judge = load_judge(directory, CPU)
    score = judge.score("a b b a")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        mean = model(torch.tensor([[0, 1, 2, 2, 1]]), labels=torch.tensor([[0, 1, 2, 2, 1]])).loss
    assert score.tokens == 4 and score.nll == pytest.approx(4 * float(mean), rel=1e-5)
    assert judge.window == 16 and judge.score(" ".join("ab" * 40)).tokens == 80
    assert judge.score("").tokens == 0


def test_own_checkpoints_judge_by_the_chain_rule(checkpoint: Callable[..., Path], world_of_one: Layout) -> None:
    judge = load_judge(checkpoint(kind="ar"), CPU)
    tokens = torch.tensor([256, *b"ab c"])
    expected = 0.0
    for stop in range(1, len(tokens)):
        expected -= float(judge.logits(tokens[:stop])[-1].double().log_softmax(-1)[tokens[stop]])
    score = judge.score("ab c")
    assert score.tokens == 4 and score.nll == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RecipeError, match=r"diffusion model \(bd3\)"):
        load_judge(checkpoint(block_size=4), CPU)


def test_directories_that_cannot_judge(tmp_path: Path, world_of_one: Layout) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(CheckpointError, match="cannot be loaded") as refused:
        load_judge(tmp_path, CPU)
    assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError):
        load_judge(tmp_path / "nowhere", CPU)
