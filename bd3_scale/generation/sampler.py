"""Text from a network, block by block: denoise a block given the clean blocks before it, commit it, go on.

Two ways to the same tokens (docs/objective.md section 5): with a cache of the finished blocks, or recomputing all (see `cached_forward`). A
block sees itself and the clean blocks that fit into the `context` tokens that end with it, at any length.

Invariants: MASK is never drawn and never left; a row's tokens depend on (seed, row index) and on its own prompt, not on
the batch; every call of the network is counted. A network of the next-token loss (`ar`) goes the same way with
L' = 1, its forward of token i being both the commitment of i and the prediction of i + 1. A network that denoises rows as one
block (L' = L) has no clean rows to go on from: longer texts come from windows of L tokens, each half a window further on,
whose first half is known from the one before (as in MDLM's published code). Nothing is cached there. Blocks of SSD-LM are denoised by
`SimplexSampler`, on the same clean rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from bd3_scale.errors import RecipeError
from bd3_scale.generation.cached_forward import CachedForward, Network, Request, Steps, one_block
from bd3_scale.generation.remasking import RemaskingPolicy
from bd3_scale.generation.token_sampling import (
    REMASKING,
    SCORE_SAMPLERS,
    SIMPLEX,
    SamplingOptions,
    draw,
    histogram_entropy,
    keyed_uniforms,
    keyed_words,
)
from bd3_scale.generation.unmasking import UnmaskingPolicy
from bd3_scale.objectives.base import Objective
from bd3_scale.objectives.noise import schedule_named
from bd3_scale.objectives.simplex import SimplexNoise

ENTROPY_WINDOW = 256
"""Generated tokens whose histogram tells a text that repeats itself."""


Until = Callable[[np.ndarray], bool]


@dataclass(frozen=True)
class Result:
    """Texts of one call, row by row."""

    tokens: list[np.ndarray]
    """int64, BOS and prompt included, the token that ended the text not."""
    prompt_lengths: list[int]
    """Tokens given at the beginning, BOS included: tokens[row][prompt_lengths[row]:] is new."""
    stops: list[str]
    """end_of_text | until | entropy | length."""
    nfe: int
    """Calls of the network for the whole batch, the committing ones too."""
    seconds: float

    @property
    def generated(self) -> int:
        """New tokens of all rows."""
        return sum(len(tokens) - prompt for tokens, prompt in zip(self.tokens, self.prompt_lengths, strict=True))


@torch.inference_mode()
def generate(
    network: Network,
    objective: Objective,
    tokens: np.ndarray,
    known: np.ndarray,
    options: SamplingOptions,
    *,
    mask_id: int,
    end_of_text: int | None,
    seed: int = 0,
    first_row: int = 0,
    use_cache: bool = True,
    device: torch.device | str = "cpu",
) -> Result:
    """Fill in the tokens that are not `known` (bool [B, N]) in `tokens` (int64 [B, N]); position 0 of every row is known.

    `end_of_text` ends a row's text where it is drawn (None: nothing does). Row r is sampled as row `first_row` + r of `seed`.
    Raises RecipeError for what this objective cannot sample, CheckpointError for a network that gives no numbers.
    """
    started = time.perf_counter()
    mine = range(first_row, first_row + len(tokens))
    text, steps = begin(objective, tokens, known, options, mask_id=mask_id, end_of_text=end_of_text, seed=seed, rows=mine)
    cached = use_cache and not one_block(objective)
    forward = CachedForward(network, objective, text.width, len(tokens), cached, torch.device(device))
    with suppress(StopIteration):
        request = next(steps)
        while True:
            request = steps.send(forward.answer(request))
    return Result(
        tokens=[row[:end].copy() for row, end in zip(text.tokens, text.ends, strict=True)],
        prompt_lengths=text.prompts,
        stops=text.stops,
        nfe=forward.nfe,
        seconds=time.perf_counter() - started,
    )


def begin(
    objective: Objective,
    tokens: np.ndarray,
    known: np.ndarray,
    options: SamplingOptions,
    *,
    mask_id: int,
    end_of_text: int | None,
    seed: int,
    rows: range,
    until: Until | None = None,
) -> tuple[Texts, Steps]:
    """The texts of `rows` of `seed` and what is to be done until all have ended, as `generate` has it. `until`: whether a text that has
    these new tokens (int64, so far) is to end there. Raises RecipeError."""
    options = resolved(objective, options)
    check(objective, options, known.shape[1])
    if tokens.shape != known.shape or not known.shape[0] or not known[:, 0].all():
        raise ValueError(
            "tokens and known must both be [B, N] with position 0 of every row known: nothing precedes it that could predict it"
        )
    if not (tokens[known].min() >= 0 and tokens[known].max() < mask_id):
        raise ValueError(f"known tokens must be ids of text, 0 to {mask_id - 1}")
    size, windows = objective.block_size, one_block(objective)
    text = Texts(tokens, known, size, size // 2 if windows else size, mask_id, options, end_of_text, until)
    kind = RemaskingPolicy if options.sampler == REMASKING else UnmaskingPolicy
    policy = kind(options, size, schedule_named(objective.noise_schedule), seed, rows)
    if objective.traits.predicts_next_token:
        return text, _next_token(text, policy)
    sampler = SimplexSampler(options, size, seed, rows) if objective.traits.on_simplex else policy
    return text, _window_by_window(text, sampler) if windows else _block_by_block(text, sampler)


def own_sampler(objective: Objective) -> str:
    """The sampler of texts for which none is named."""
    return SIMPLEX if objective.traits.on_simplex else "first_hitting"


def resolved(objective: Objective, options: SamplingOptions) -> SamplingOptions:
    """The options with a sampler. Raises RecipeError where others mean nothing to it."""
    return options if options.sampler is not None else replace(options, sampler=own_sampler(objective))


def check(objective: Objective, options: SamplingOptions, length: int) -> None:
    """Raise RecipeError where a network of this objective cannot make texts of `length` tokens with these options."""
    traits = objective.traits
    if length < 1:
        raise RecipeError(f"length is {length} but a text has at least the token that begins it; set 1 or more")
    if traits.predicts_next_token and options.sampler != "first_hitting":
        raise RecipeError(f"sampler {options.sampler} needs a diffusion model, and this one predicts the next token; set first_hitting")
    if traits.uses_cross_entropy and options.sampler in SCORE_SAMPLERS:
        raise RecipeError(
            f"sampler {options.sampler} needs scores that are not normalised (objective.kind=sedd); for this model they are one "
            "with ancestral: set that"
        )
    if traits.noise_conditioned and not (traits.denoises_whole_rows or traits.on_simplex):
        raise RecipeError(f"objective.kind={traits.name} has no sampler that conditions its blocks on noise; sample another model")
    if traits.on_simplex != (options.sampler == SIMPLEX):
        raise RecipeError(
            f"sampler {options.sampler} does not denoise what this model was trained on, "
            f"{'noised logits of words (objective.kind=ssdlm)' if traits.on_simplex else 'masked words'}; set {own_sampler(objective)}"
        )


def _window_by_window(text: Texts, policy: UnmaskingPolicy | SimplexSampler) -> Steps:
    """For rows of one block. A window that is known already takes no call."""
    for number, start in enumerate(range(0, text.width, text.stride)):
        if not text.open():
            break
        stop = start + text.block_size
        yield from _denoise(text, policy, number, slice(start, stop), begins=True)
        text.finish(stop)


def _block_by_block(text: Texts, policy: UnmaskingPolicy | SimplexSampler) -> Steps:
    size, start = text.block_size, 0
    while text.open():
        stop = start + text.known_blocks(start) * size
        if stop > start:
            yield Request(text.tokens, start, stop, clean=True)
            start = stop
            continue
        stop = start + size
        yield from _denoise(text, policy, start // size, slice(start, stop), begins=start == 0)
        text.finish(stop)
        if text.open():
            yield Request(text.tokens, start, stop, clean=True)
        start = stop


def _denoise(text: Texts, policy: UnmaskingPolicy | SimplexSampler, number: int, block: slice, begins: bool) -> Steps:
    """Find the unknown tokens of one block. The last block is a whole one, as in training, even where the text ends inside it.
    `begins`: whether to the network it is the beginning of a row."""
    masked, wanted = ~text.known[:, block], text.length - block.start
    if isinstance(policy, SimplexSampler):
        if masked[:, :wanted].any():
            yield from policy.denoise(number, text.tokens, text.known[:, block], block, begins)
            text.known[:, block] = True
        return
    wanted = text.block_size if policy.whole_blocks else wanted
    policy.begin_block(number, masked)
    while masked[:, :wanted].any():
        logits = yield Request(text.tokens, block.start, block.stop, noise=policy.noise(masked))
        revealed = policy.reveal(masked, logits)
        text.tokens[:, block][revealed] = policy.draw(logits, revealed)
        masked &= ~revealed
        again = policy.remask(masked)
        text.tokens[:, block][again] = text.mask_id
        masked |= again
    text.known[:, block] |= ~masked


def _next_token(text: Texts, policy: UnmaskingPolicy) -> Steps:
    read = position = 0
    while text.open():
        position += text.known_blocks(position)
        logits = yield Request(text.tokens, read, position, clean=True, last=1)
        masked = ~text.known[:, position : position + 1]
        policy.begin_block(position, masked)
        text.tokens[:, position : position + 1][masked] = policy.draw(logits, masked)
        text.known[:, position] = True
        read, position = position, position + 1
        text.finish(position)


class Texts:
    """The rows while they grow: tokens int64 and known bool [B, width], the length rounded up to whole blocks.

    A block begins `stride` tokens after the one before: `block_size`, or less where blocks overlap.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        known: np.ndarray,
        block_size: int,
        stride: int,
        mask_id: int,
        options: SamplingOptions,
        end_of_text: int | None,
        until: Until | None = None,
    ) -> None:
        rows, self.length = known.shape
        self.block_size, self.stride = block_size, stride
        self.width = block_size + -(-max(0, self.length - block_size) // stride) * stride
        self.mask_id = mask_id
        self.known = np.zeros((rows, self.width), bool)
        self.known[:, : self.length] = known
        self.tokens = np.full((rows, self.width), mask_id, np.int64)
        self.tokens[self.known] = tokens[known]
        self.given = self.known.copy()
        self.options, self.end_of_text, self.until = options, end_of_text, until
        self.prompts = [int(row.argmin()) if not row.all() else len(row) for row in known]
        """Tokens given at the beginning of each."""
        self.ends = [self.length] * rows
        self.stops = [""] * rows
        self._checked = 0
        for row in np.flatnonzero(known.all(1)):
            self._end(int(row), "length", self.length)

    def open(self) -> bool:
        """Whether any row is unfinished."""
        return "" in self.stops

    def known_blocks(self, start: int) -> int:
        """How many blocks from `start` on are known in all rows."""
        whole = self.known[:, start:].all(0).reshape(-1, self.block_size).all(1)
        return len(whole) if whole.all() else int(whole.argmin())

    def finish(self, stop: int) -> None:
        """Everything before `stop` is known now: end the rows that came to an end."""
        stop = min(stop, self.length)
        for row, reason in enumerate(self.stops):
            if reason:
                continue
            drawn = ~self.given[row, :stop]
            ends = np.flatnonzero(drawn[self._checked :] & (self.tokens[row, self._checked : stop] == self.end_of_text))
            if len(ends):
                self._end(row, "end_of_text", self._checked + int(ends[0]))
            elif self.until is not None and self.until(self.tokens[row, self.prompts[row] : stop]):
                self._end(row, "until", stop)
            elif self._repeats(row, stop):
                self._end(row, "entropy", stop)
            elif stop == self.length or self.known[row, : self.length].all():
                self._end(row, "length", self.length)
        self._checked = stop

    def _repeats(self, row: int, stop: int) -> bool:
        if self.options.minimum_entropy is None:
            return False
        generated = self.tokens[row, :stop][~self.given[row, :stop]]
        window = generated[-ENTROPY_WINDOW:]
        return len(window) == ENTROPY_WINDOW and histogram_entropy(window) < self.options.minimum_entropy

    def _end(self, row: int, reason: str, end: int) -> None:
        self.stops[row], self.ends[row] = reason, end
        # The others may go on: what this row holds from here on is nobody's text, but it must be known and no MASK.
        unknown = ~self.known[row]
        self.tokens[row, unknown] = self.tokens[row, 0]
        self.known[row] = True


class SimplexSampler:
    """Words of a block by SSD-LM's decoding, for rows `rows` of `seed`: from pure noise, T times a prediction, a word for every position,
    and less noise.

    At time t of T equal steps the network predicts all words of the block from x_t; a word is drawn for every position from the
    nucleus of its logits (the paper's sampling projection); its almost-one-hot logits, noised anew to the time before, are the next
    x_t. After T predictions the words of the last are the block. Known words of a block (a prompt that ends inside it) are noised like
    the drawn ones, which is what their positions were in training; they are never changed.

    Invariants: a row's words depend on (seed, row index, block, step) and on its own logits, never on the batch; MASK is not drawn;
    the network is called exactly T times.
    """

    def __init__(self, options: SamplingOptions, block_size: int, seed: int, rows: range) -> None:
        self.options, self.seed, self.rows = options, seed, rows
        self.steps = options.steps or block_size

    def denoise(self, number: int, text: np.ndarray, known: np.ndarray, block: slice, begins: bool) -> Steps:
        """Draw the words that are not `known` (bool [B, L']) in `block`, the `number`-th, of `text` int64 [B, width], in place.

        `begins`: whether the first position is a row's first, which is never noised.
        """
        tokens = text[:, block]
        unknown = np.flatnonzero(~known)
        for step in range(self.steps):
            time = (self.steps - step) / self.steps
            times = np.full(tokens.shape, time)
            if begins:
                times[:, 0] = 0.0
            keys = keyed_words(self.seed, "simplex", self.rows, number, tokens.shape[1], step).view(np.int64)
            logits = (yield Request(text, block.start, block.stop, simplex=SimplexNoise.at(keys, times), time=time)).flatten(0, 1)
            uniforms = keyed_uniforms(self.seed, "token", self.rows, number, tokens.shape[1], step).ravel()[unknown]
            chosen = logits[torch.from_numpy(unknown).to(logits.device)]
            tokens[~known] = draw(chosen, torch.from_numpy(uniforms).to(logits.device), self.options).cpu().numpy()
