"""lm-evaluation-harness on a checkpoint of this project: model `bd3_scale`.

    python -m bd3_scale.evaluation.harness run --model bd3_scale --model_args checkpoint=RUN,draws=32 --tasks lambada_openai

(`pip install bd3_scale[harness]`; the arguments are those of `lm_eval`.) `loglikelihood` is exact for next-token networks and
L' = 1, for others the mean of `draws` draws of a bound (continuation.py); `generate_until` samples block by block. Whether a
continuation is what greedy decoding would write is found by writing it: `greedy=False` leaves that out, and says no.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found,unused-ignore]
from lm_eval.api.registry import register_model  # type: ignore[import-not-found,unused-ignore]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found,unused-ignore]
from tqdm import tqdm

from bd3_scale.errors import RecipeError
from bd3_scale.evaluation.continuation import continuation_log_likelihood
from bd3_scale.generation.load_model import load_network
from bd3_scale.generation.sampler import generate
from bd3_scale.generation.token_sampling import SamplingOptions
from bd3_scale.launcher import launched


@register_model("bd3_scale")
class BlockDiffusionLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint as the harness sees it. One process; raises what `load_network` raises, and RecipeError for options."""

    def __init__(
        self,
        checkpoint: str,
        draws: int = 32,
        seed: int = 0,
        weights: str = "auto",
        device: str | None = "auto",
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        sampler: str | None = None,
        max_gen_toks: int = 64,
        greedy: bool = True,
    ) -> None:
        """`draws` of noise per continuation, `batch_size` of them at a time; `max_gen_toks` where a task does not say."""
        super().__init__()
        if launched().world_size > 1:
            raise RecipeError("the harness adapter runs in one process; start it without torchrun")
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise RecipeError(f"batch_size is {batch_size!r} but must be a number, without max_batch_size; set batch_size=8")
        self.loaded = load_network(checkpoint, weights=weights, device=(device or "auto").partition(":")[0])
        self.draws, self.seed, self.micro_batch = int(draws), int(seed), int(batch_size or 8)
        self.sampler, self.max_gen_toks, self.greedy = sampler, int(max_gen_toks), greedy

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.loaded.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers = []
        for (context, text), known, continuation in tqdm(requests, disable=disable_tqdm):
            known = known if context else []  # the harness puts the BOS there, which every row has anyway
            answer = self._log_likelihood(known, continuation), self.greedy and self._is_greedy(known, continuation)
            self.cache_hook.add_partial("loglikelihood", (context, text), answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        answers = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.eot_token_id, max_seq_len=self.loaded.recipe.model.context - 1, context_len=1
            )
            # The first window's context is the BOS, which every row has.
            pairs = [make_disjoint_window(window) for window in windows]
            answer = sum(self._log_likelihood(known if place else [], scored) for place, (known, scored) in enumerate(pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
            answers.append(answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._until(*request.args) for request in tqdm(requests, disable=disable_tqdm)]

    def _until(self, context: str, asked: dict[str, Any]) -> str:
        options = dict(asked)
        until, count = options.pop("until", []), int(options.pop("max_gen_toks", self.max_gen_toks))
        sampled = bool(options.pop("do_sample", False))
        temperature, top_p = float(options.pop("temperature", 1.0 if sampled else 0.0)), float(options.pop("top_p", 1.0))
        if options:
            raise RecipeError(f"generation option {min(options)!r} is not known here; leave it out of the task's generation_kwargs")
        choice = SamplingOptions(self.sampler, temperature=temperature if sampled else 0.0, top_p=top_p)
        new = self._written(self.tok_encode(context), count, choice, self.eot_token_id)
        text = self.loaded.tokenizer.decode(new)
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        self.cache_hook.add_partial("generate_until", (context, asked), text)
        return text

    def _log_likelihood(self, known: list[int], continuation: list[int]) -> float:
        return continuation_log_likelihood(self.loaded, known, continuation, draws=self.draws, seed=self.seed, micro_batch=self.micro_batch)

    def _is_greedy(self, known: list[int], continuation: list[int]) -> bool:
        return self._written(known, len(continuation), SamplingOptions(temperature=0.0), None) == list(continuation)

    def _written(self, known: list[int], count: int, options: SamplingOptions, end_of_text: int | None) -> list[int]:
        """At most `count` tokens after the context, of which as much as fits is kept."""
        room = self.loaded.recipe.model.context - 1 - count
        if room < 0:
            raise RecipeError(f"{count} new tokens do not fit into the model's context; set max_gen_toks={count + room} or less")
        prompt = [self.eot_token_id, *known[max(0, len(known) - room) :]]
        tokens = np.full((1, len(prompt) + count), self.eot_token_id, np.int64)
        tokens[0, : len(prompt)] = prompt
        given = np.arange(tokens.shape[1])[None] < len(prompt)
        result = generate(
            self.loaded.network,
            self.loaded.objective,
            tokens,
            given,
            options,
            mask_id=self.loaded.tokenizer.mask_id,
            end_of_text=end_of_text,
            seed=self.seed,
            device=self.loaded.device,
        )
        return [int(token) for token in result.tokens[0][len(prompt) :]]


def main() -> int:
    """The harness' own command, which knows the model `bd3_scale` because this module is loaded."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found,unused-ignore]

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
