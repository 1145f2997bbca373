"""A language model that reads generated texts: generative perplexity is its perplexity of them.

Any causal language model in a local `transformers` directory (GPT-2 large in the paper), or a next-token checkpoint of this
project, where nothing else is at hand. Invariants: texts are tokenized anew by the judge's own tokenizer; every token of a
text is scored exactly once, the first one given the judge's own beginning of text; texts longer than the judge's window are
read in windows that overlap by half, as in the paper's code; nothing is downloaded and no code of a model directory is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bd3_scale.data.formats.streaming_compat import prepare_torchvision
from bd3_scale.errors import CheckpointError, RecipeError, one_line
from bd3_scale.generation.load_model import LoadedNetwork, load_network

LONGEST_WINDOW = 1024
"""Tokens a judge reads at a time, where it can read more: GPT-2's context, so that judges compare."""


@dataclass(frozen=True)
class Score:
    """What a judge says of one text."""

    nll: float
    """Sum over its tokens, nats."""
    tokens: int
    """The judge's tokens of the text; 0 for an empty one."""


@dataclass(frozen=True)
class Judge:
    """A causal language model for scoring."""

    name: str
    encode: Callable[[str], list[int]]
    logits: Callable[[Tensor], Tensor]
    """int64 [n] tokens, n <= window -> [n, V]: row i predicts token i + 1."""
    begin: int
    """The token that precedes a text."""
    window: int

    @torch.no_grad()
    def score(self, text: str) -> Score:
        """The text's negative log-likelihood. Raises CheckpointError for a judge whose logits are no numbers."""
        ids = self.encode(text)
        nll = text_nll(self.logits, torch.tensor([self.begin, *ids]), self.window)
        if not bool(nll.isfinite().all()):
            raise CheckpointError(f"judge {self.name} gives no finite likelihood; name another model")
        return Score(float(nll.sum()), len(ids))


def text_nll(logits: Callable[[Tensor], Tensor], tokens: Tensor, window: int) -> Tensor:
    """-log p of tokens[1:], float64 [n - 1], each given all tokens before it that its window holds.

    The first window is read whole; each further one begins half a window later and scores what the one before did not reach.
    """
    parts, done, start = [], 1, 0
    while done < len(tokens):
        part = tokens[start : start + window]
        log_p = logits(part).cpu().double().log_softmax(-1)[:-1]
        of_tokens = -log_p.gather(1, part[1:, None])[:, 0]
        parts.append(of_tokens[done - start - 1 :])
        done = start + len(part)
        start += max(1, window // 2)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def load_judge(path: Path, device: torch.device) -> Judge:
    """The judge in `path`: a `transformers` directory (it has a config.json), or a checkpoint or run of this project.

    Collective where networks are divided among tensor-parallel ranks. Raises CheckpointError for a directory that cannot be
    used, RecipeError for a checkpoint that predicts no next token.
    """
    if (path / "config.json").is_file():
        return _of_transformers(path, device)
    loaded = load_network(path, device=device.type)
    if not loaded.objective.traits.predicts_next_token:
        raise RecipeError(f"judge {path} is a diffusion model ({loaded.objective.kind}); name a checkpoint of objective.kind=ar")
    return own_judge(loaded)


def own_judge(loaded: LoadedNetwork) -> Judge:
    """A next-token network of this project as a judge."""

    def logits(tokens: Tensor) -> Tensor:
        mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=loaded.device).tril()
        positions = torch.arange(len(tokens), device=loaded.device)
        return loaded.network.decode(tokens[None].to(loaded.device), positions, None, mask, last=len(tokens))[0]

    tokenizer, window = loaded.tokenizer, min(LONGEST_WINDOW, loaded.recipe.model.context)
    return Judge(str(loaded.checkpoint.path), tokenizer.encode, logits, tokenizer.end_of_text, window)


def _of_transformers(path: Path, device: torch.device) -> Judge:
    prepare_torchvision()  # transformers imports it where it is installed
    try:
        import transformers
    except ImportError:
        raise CheckpointError(f"judge {path} needs the package transformers, which is not installed; pip install transformers") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = one_line(error, 300)
        raise CheckpointError(f"judge {path} cannot be loaded as a causal language model ({why}); name another directory") from None
    model = model.to(device).eval().requires_grad_(False)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise CheckpointError(f"judge {path} has a tokenizer without a beginning or end of text; name another model")
    window = min(LONGEST_WINDOW, getattr(model.config, "max_position_embeddings", None) or LONGEST_WINDOW)

    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = model(tokens[None].to(device)).logits[0]
        return found

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return Judge(str(path), encode, logits, int(begin), window)
