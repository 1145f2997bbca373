"""lm-evaluation-harness on a checkpoint of this project: model `bd3_scale`.

    python -m bd3_scale.evaluation.harness run --model bd3_scale --model_args checkpoint=RUN,draws=32 --tasks lambada_openai

(`pip install bd3_scale[harness]`; the arguments are those of `lm_eval`.) `loglikelihood` is exact for next-token networks and
L' = 1, for others the mean of `draws` draws of a bound (continuation.py); `generate_until` samples block by block. Whether a
continuation is what greedy decoding would write is found by writing it: `greedy=False` leaves that out, and says no.

Everything goes `batch_size` rows at a time. Under torchrun every process asks for everything, replicas (of `tensor` ranks) share the items,
and all get all answers. Invariant: an answer depends on its request alone, not on batch, replicas or what else is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found,unused-ignore]
from lm_eval.api.registry import register_model  # type: ignore[import-not-found,unused-ignore]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found,unused-ignore]
from tqdm import tqdm

from bd3_scale.distributed import layout
from bd3_scale.errors import RecipeError, UserError
from bd3_scale.evaluation.continuation import continuation_log_likelihoods
from bd3_scale.evaluation.world import load_replicas
from bd3_scale.generation.slots import Job, generate_each, in_order
from bd3_scale.generation.token_sampling import SamplingOptions
from bd3_scale.messages import log, show
from bd3_scale.program import run_program

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "typical_p": (1, None),
    "repetition_penalty": (1, None),
    "length_penalty": (1, None),
    "early_stopping": (False, None),
    "use_cache": (True, None),
}
"""Options of other models -> values with which they would do nothing either."""


@register_model("bd3_scale")
class BlockDiffusionLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint as the harness sees it; collective in the world. Raises what `load_replicas` raises, and RecipeError for options."""

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
        tensor: int | None = None,
    ) -> None:
        """`draws` of noise per continuation, `batch_size` rows at a time; `max_gen_toks` where a task does not say; `tensor` ranks share a
        network."""
        super().__init__()
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise RecipeError(f"batch_size is {batch_size!r} but must be a number, without max_batch_size; set batch_size=8")
        place = (device or "auto").partition(":")[0]
        self.loaded, self.layout = load_replicas(checkpoint, tensor=tensor, weights=weights, device=place)
        self.draws, self.seed, self.micro_batch = int(draws), int(seed), int(batch_size or 8)
        self.sampler, self.max_gen_toks, self.greedy = sampler, int(max_gen_toks), greedy
        self._said: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.loaded.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # The harness puts the BOS there where there is no context, and every row has it anyway.
        pairs = [(known if context else [], continuation) for (context, _), known, continuation in requests]
        values = self._log_likelihoods(pairs, disable_tqdm)
        greedy = [False] * len(pairs)
        if self.greedy:
            greedy = self._shared(range(len(pairs)), lambda mine: self._are_greedy([pairs[place] for place in mine]), disable_tqdm)
        answers = list(zip(values, greedy, strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        pairs, owners = [], []
        for place, text in enumerate(texts):
            windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.eot_token_id, max_seq_len=self.loaded.recipe.model.context - 1, context_len=1
            )
            # The first window's context is the BOS, which every row has.
            disjoint = [make_disjoint_window(window) for window in windows]
            pairs += [(known if number else [], scored) for number, (known, scored) in enumerate(disjoint)]
            owners += [place] * len(disjoint)
        values = self._log_likelihoods(pairs, disable_tqdm)
        answers = np.bincount(owners, values, minlength=len(texts)).tolist() if texts else []
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [request.args for request in requests]
        seen: Counter[str] = Counter()
        jobs, stops = [], []
        for context, options in asked:
            repeat = seen[repr((context, options))]  # the n-th sample for the same context is one of its own
            seen[repr((context, options))] += 1
            choice, until, count = self._options(options)
            jobs.append(self._job(self.tok_encode(context), count, choice, self.eot_token_id, repeat, until))
            stops.append(until)
        answers = self._shared(range(len(jobs)), lambda mine: self._texts([(jobs[place], stops[place]) for place in mine]), disable_tqdm)
        for request, answer in zip(asked, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request, answer)
        return answers

    def _shared(self, order: Sequence[int], work: Callable[[Sequence[int]], Iterable[Any]], quiet: bool) -> list[Any]:
        """Answers for all items, from 0, on every rank, each made by one replica in this order: `work` yields those of its items."""
        mine = order[self.layout.data_rank :: self.layout.data]
        bar = tqdm(total=len(mine), disable=quiet or not self.layout.is_main_rank)
        answers: list[Any] = []
        with bar:
            for answer in work(mine):
                answers.append(answer)
                bar.update()
        gathered = self.layout.all_gather(dict(zip(mine, answers, strict=True)) if self.layout.reports_for_replica else {})
        found = {place: answer for share in gathered for place, answer in share.items()}
        return [found[place] for place in range(len(order))]

    def _log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[float]:
        """The longest first: a forward's rows are as long as its longest, and what does not fit fails at once."""

        def values(mine: Sequence[int]) -> Iterator[float]:
            asked = [pairs[place] for place in mine]
            return continuation_log_likelihoods(self.loaded, asked, draws=self.draws, seed=self.seed, micro_batch=self.micro_batch)

        by_length = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
        return self._shared(by_length, values, quiet)

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[bool]:
        """Whether greedy decoding writes the continuation; one that has left it is not gone on with."""
        choice = SamplingOptions(temperature=0.0)
        jobs = []
        for known, continuation in pairs:
            job = self._job(known, len(continuation), choice, None, 0, [])
            jobs.append(replace(job, until=_leaves(np.array(continuation))))
        written = self._written(jobs)
        return (tokens == list(continuation) for tokens, (_, continuation) in zip(written, pairs, strict=True))

    def _texts(self, jobs: Sequence[tuple[Job, list[str]]]) -> Iterator[str]:
        for tokens, (_, stops) in zip(self._written([job for job, _ in jobs]), jobs, strict=True):
            text = self.loaded.tokenizer.decode(tokens)
            for stop in stops:
                text = text.split(stop)[0]
            yield text

    def _options(self, asked: dict[str, Any]) -> tuple[SamplingOptions, list[str], int]:
        """(how tokens are chosen, strings that end a text, new tokens) of generation_kwargs; what is not done here is said once."""
        options = dict(asked)
        until, count = options.pop("until", []) or [], int(options.pop("max_gen_toks", self.max_gen_toks))
        sampled = bool(options.pop("do_sample", False))
        temperature, top_p = float(options.pop("temperature", 1.0 if sampled else 0.0)), float(options.pop("top_p", 1.0))
        for name, value in options.items():
            if name not in NEUTRAL or value not in NEUTRAL[name]:
                self._warn(f"generation option {name}={value!r} does nothing here; texts are sampled without it")
        choice = SamplingOptions(self.sampler, temperature=temperature if sampled else 0.0, top_p=top_p)
        return choice, [stop for stop in ([until] if isinstance(until, str) else until) if stop], count

    def _warn(self, text: str) -> None:
        if text not in self._said and self.layout.is_main_rank:
            log.warning(text)
        self._said.add(text)

    def _job(self, known: list[int], count: int, options: SamplingOptions, end_of_text: int | None, row: int, until: list[str]) -> Job:
        """At most `count` tokens after the context: as many as leave half of the row to the context, of which what fits is kept."""
        length = self.loaded.recipe.model.context
        most = length - 1 - min(len(known), (length - 1) // 2)
        if count > most:
            self._warn(
                f"max_gen_toks={count} does not fit into the model's context of {length} beside the prompt; as much is written as fits"
            )
            count = most
        room = length - 1 - count
        prompt = [self.eot_token_id, *known[max(0, len(known) - room) :]]
        tokens = np.full(len(prompt) + count, self.eot_token_id, np.int64)
        tokens[: len(prompt)] = prompt
        decode = self.loaded.tokenizer.decode

        def ended(new: np.ndarray) -> bool:
            text = decode(new.tolist())
            return any(stop in text for stop in until)

        return Job(row, tokens, np.arange(len(tokens)) < len(prompt), options, end_of_text, ended if until else None)

    def _written(self, jobs: Sequence[Job]) -> Iterator[list[int]]:
        """The new tokens of each, in their order: a batch at a time, in which the next takes the place of one that has ended."""
        finished = generate_each(
            self.loaded.network,
            self.loaded.objective,
            jobs,
            slots=self.micro_batch,
            longest=self.loaded.recipe.model.context,
            mask_id=self.loaded.tokenizer.mask_id,
            seed=self.seed,
            device=self.loaded.device,
        )
        return (one.tokens[one.prompt :].tolist() for one in in_order(finished))


def _leaves(target: np.ndarray) -> Callable[[np.ndarray], bool]:
    """Whether new tokens are not the first of `target`."""
    return lambda new: bool((new != target[: len(new)]).any())


def main() -> int:
    """The harness' own command, which knows the model `bd3_scale` because this module is loaded."""
    show()
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found,unused-ignore]

    try:
        cli_evaluate()
    except UserError as error:
        return error.say()
    if dist.is_initialized():
        layout.stop()
    return 0


if __name__ == "__main__":
    run_program(main)
