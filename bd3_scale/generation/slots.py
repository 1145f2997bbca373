"""Many texts through few slots: whoever has finished makes room for the next, and nobody waits for another's block.

Every text is a sampler of its own (`sampler.begin`) that asks for logits. In each round what all slots ask is put together: one call of the
network for all noisy blocks and the finished ones that are read, one more where prompts of another length are read. Slots stand at
positions of their own, so that position ids and masks are those of each row.

Invariants: a text is the one that `generate` makes of it alone (to the rounding of its logits), whoever shares the calls; no more texts are
begun than there are slots; finished ones come in the order in which they finish; every call is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bd3_scale.attention.mask import decoding_mask
from bd3_scale.generation.cached_forward import Network, Request, Steps, one_block, segments_of
from bd3_scale.generation.sampler import Texts, Until, begin
from bd3_scale.generation.token_sampling import SamplingOptions
from bd3_scale.objectives.base import Objective
from bd3_scale.objectives.sedd import noise_levels
from bd3_scale.objectives.simplex import SimplexNoise, conditioning_times


class SlotNetwork(Network, Protocol):
    """See model.transformer.Transformer; here `decode` is given positions [b, n]."""

    def new_slots(self, slots: int, capacity: int) -> Any: ...


@dataclass(frozen=True)
class Job:
    """One text that is wanted: as the arguments of `sampler.generate`, of one row."""

    row: int
    """Of `seed`: with it, this text is what it is."""
    tokens: np.ndarray
    """int64 [N]"""
    known: np.ndarray
    """bool [N]"""
    options: SamplingOptions
    end_of_text: int | None
    until: Until | None = None


@dataclass(frozen=True)
class Finished:
    place: int
    """Which of the jobs, from 0."""
    tokens: np.ndarray
    """int64, as in `sampler.Result`."""
    prompt: int
    """Tokens given at its beginning, BOS included."""
    stop: str


@torch.inference_mode()
def generate_each(
    network: SlotNetwork,
    objective: Objective,
    jobs: Iterable[Job],
    *,
    slots: int,
    longest: int,
    mask_id: int,
    seed: int = 0,
    use_cache: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[Finished]:
    """The texts of all jobs, none longer than `longest` tokens, at most `slots` at a time. Raises what `generate` raises."""
    forward = SlotForward(network, objective, slots, longest, use_cache and not one_block(objective), torch.device(device))
    waiting, busy = enumerate(jobs), dict[int, _Busy]()
    free = list(range(slots))
    while True:
        for slot in [slot for slot, one in busy.items() if one.request is None]:
            yield busy.pop(slot).finished()
            free.append(slot)
        while free and (job := next(waiting, None)) is not None:
            slot = free.pop()
            forward.clear(slot)
            busy[slot] = _Busy.of(*job, objective, mask_id, seed)
        if not busy:
            return
        answers = forward.answer({slot: one.request for slot, one in busy.items() if one.request is not None})
        for slot, logits in answers.items():
            busy[slot].send(logits)


def in_order(finished: Iterable[Finished]) -> Iterator[Finished]:
    """The same in the order of the jobs: one that finishes early is held until all before it have."""
    held: dict[int, Finished] = {}
    turn = 0
    for one in finished:
        held[one.place] = one
        while turn in held:
            yield held.pop(turn)
            turn += 1


class _Busy:
    """A text in its slot. `request`: what it waits for; None where it has ended."""

    def __init__(self, place: int, text: Texts, steps: Steps) -> None:
        self.place, self.text, self.steps = place, text, steps
        self.request: Request | None = next(steps, None)

    @staticmethod
    def of(place: int, job: Job, objective: Objective, mask_id: int, seed: int) -> _Busy:
        text, steps = begin(
            objective,
            job.tokens[None],
            job.known[None],
            job.options,
            mask_id=mask_id,
            end_of_text=job.end_of_text,
            seed=seed,
            rows=range(job.row, job.row + 1),
            until=job.until,
        )
        return _Busy(place, text, steps)

    def send(self, logits: Tensor) -> None:
        try:
            self.request = self.steps.send(logits)
        except StopIteration:
            self.request = None

    def finished(self) -> Finished:
        text = self.text
        return Finished(self.place, text.tokens[0, : text.ends[0]].copy(), text.prompts[0], text.stops[0])


class SlotForward:
    """The network with what it has read in every slot."""

    def __init__(self, network: SlotNetwork, objective: Objective, slots: int, longest: int, use_cache: bool, device: torch.device) -> None:
        self.network, self.device, self.nfe = network, device, 0
        self.one_block, self.noise_conditioned, pattern = one_block(objective), objective.traits.noise_conditioned, objective.pattern
        self.block_size, self.context = pattern.block_size, pattern.length
        self.causal, self.document_end = pattern.clean_half == "causal", pattern.document_end
        window = max((self.context - 1) // self.block_size, 1) * self.block_size
        width = -(-longest // self.block_size) * self.block_size
        self.cache = network.new_slots(slots, min(width, window)) if use_cache else None

    def clear(self, slot: int) -> None:
        if self.cache is not None:
            self.cache.clear(slot)

    def answer(self, asked: dict[int, Request]) -> dict[int, Tensor]:
        """Slot -> logits [1, wanted rows, V] of its request."""
        answers = {slot: torch.empty(0) for slot in asked}
        left = dict(asked)
        if self.cache is None and not self.one_block:  # what is read is read again in every call
            left = {slot: request for slot, request in asked.items() if not request.clean or request.last}
        while left:
            parts = {slot: self._part(request) for slot, request in left.items()}
            groups: dict[tuple[int, bool], list[int]] = {}
            for slot, part in parts.items():
                rows = part.stop - part.start if self.cache is not None or self.one_block else 0
                groups.setdefault((rows, part.simplex is not None), []).append(slot)
            for slots in groups.values():
                answers.update(zip(slots, self._call(slots, [parts[slot] for slot in slots]), strict=True))
            left = {slot: replace(left[slot], start=part.stop) for slot, part in parts.items() if part.stop < left[slot].stop}
        return answers

    def _part(self, request: Request) -> Request:
        """As much of it as the cache takes at a time."""
        if self.cache is None or request.stop - request.start <= self.cache.capacity:
            return request
        return replace(request, stop=request.start + self.cache.capacity, last=0)

    def _call(self, slots: Sequence[int], requests: Sequence[Request]) -> list[Tensor]:
        """One call of the network for requests of as many rows (uncached: of any)."""
        self.nfe += 1
        wanted = [request.last if request.clean else request.stop - request.start for request in requests]
        most = max(wanted)
        if self.one_block:
            logits = self._windows(requests)
        elif self.cache is not None:
            logits = self._cached(slots, requests, most)
        else:
            logits = self._whole(requests, most)
        return [logits[place : place + 1, most - count :] if count else torch.empty(0) for place, count in enumerate(wanted)]

    def _windows(self, requests: Sequence[Request]) -> Tensor:
        # Rows of one block are at the same positions wherever they lie in a longer text: as in training.
        rows = np.concatenate([request.tokens[:, request.start : request.stop] for request in requests])
        named: dict[str, Any] = {}
        if requests[0].simplex is not None:
            named = self._noised(requests, self.block_size)
        elif self.noise_conditioned:
            named = {"noise_levels": noise_levels(np.concatenate([request.noise for request in requests])).to(self.device)}
        positions = torch.arange(self.block_size, device=self.device)
        return self.network.decode(torch.from_numpy(rows).to(self.device), positions, None, None, last=self.block_size, **named)

    def _cached(self, slots: Sequence[int], requests: Sequence[Request], last: int) -> Tensor:
        assert self.cache is not None
        view = self.cache.rows(list(slots), [request.clean for request in requests])
        rows = np.concatenate([request.tokens[:, request.start : request.stop] for request in requests])
        positions = torch.tensor([request.start for request in requests])[:, None] + torch.arange(rows.shape[1])
        mask = self._mask(requests, positions, torch.cat([view.positions, positions], 1))
        named = self._noised(requests, rows.shape[1]) if requests[0].simplex is not None else {}
        commit = any(request.clean for request in requests)
        return self._decode(rows, positions, view, mask, commit=commit, last=last, **named)

    def _whole(self, requests: Sequence[Request], last: int) -> Tensor:
        """Every text from its beginning; those that are shorter stand behind rows that nobody sees."""
        width = max(request.stop for request in requests)
        rows = np.zeros((len(requests), width), np.int64)
        for row, request in zip(rows, requests, strict=True):
            row[width - request.stop :] = request.tokens[0, : request.stop]
        positions = torch.tensor([request.stop - width for request in requests])[:, None] + torch.arange(width)
        mask = self._mask(requests, positions, positions)
        named = self._noised(requests, width) if requests[0].simplex is not None else {}
        return self._decode(rows, positions.clamp(min=0), None, mask, last=last, **named)

    def _mask(self, requests: Sequence[Request], positions: Tensor, seen: Tensor) -> Tensor:
        """bool [b, n, m] of position ids [b, n] and [b, m]; negative ones are nobody's, and see each other."""
        mask = decoding_mask(positions, seen, self.block_size, self.context)
        mask &= (seen >= 0)[:, None, :] | (positions < 0)[:, :, None]
        noisy_from = [request.stop if request.clean else request.start for request in requests]
        if self.causal:  # inside a clean block, too; a noisy one sees itself whole
            noisy = positions >= torch.tensor(noisy_from)[:, None]
            mask &= (seen[:, None, :] <= positions[:, :, None]) | noisy[:, :, None]
        if self.document_end is not None:
            for place, (request, first) in enumerate(zip(requests, noisy_from, strict=True)):
                segments = torch.from_numpy(segments_of(request.tokens[:, : request.stop], first, self.document_end))[0]
                mask[place] &= segments[positions[place].clamp(min=0)][:, None] == segments[seen[place].clamp(min=0)]
        return mask

    def _noised(self, requests: Sequence[Request], width: int) -> dict[str, Any]:
        """Of the words of a block each, the last ones of `width` rows; the rows before them are clean."""
        times = np.zeros((len(requests), width))
        for row, request in zip(times, requests, strict=True):
            row[-self.block_size :] = request.time
        parts = [(each.keys, each.signal, each.spread) for request in requests if (each := request.simplex) is not None]
        noise = SimplexNoise(*(torch.cat(part).to(self.device) for part in zip(*parts, strict=True)))
        return {"noise_levels": conditioning_times(times).to(self.device), "simplex": noise}

    def _decode(self, rows: np.ndarray, positions: Tensor, view: Any, mask: Tensor, **named: Any) -> Tensor:
        seen = None if bool(mask.all()) else mask[:, None].to(self.device)
        return self.network.decode(torch.from_numpy(rows).to(self.device), positions.to(self.device), view, seen, **named)
