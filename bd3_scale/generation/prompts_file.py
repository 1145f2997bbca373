"""Texts for a file of prompts, through slots that finished ones leave to the next; one JSON line each, in the order of the prompts.

A line is written when its text and all before it are there. The same command goes on behind the last whole line of its output, where that
belongs to the same prompts, network and options. Invariant: however often it was killed, and through however many slots the texts went, the
file is the one of an undisturbed command through one slot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bd3_scale.collective_errors import together
from bd3_scale.errors import CheckpointError, RecipeError, TrainingError
from bd3_scale.generation.generate import alike, checked, given_of
from bd3_scale.generation.slots import Finished, Job, generate_each, in_order
from bd3_scale.generation.token_sampling import SamplingOptions

if TYPE_CHECKING:
    from bd3_scale.generation.load_model import LoadedNetwork

SLOTS = 8


@dataclass(frozen=True)
class Made:
    texts: int
    """Of all prompts."""
    before: int
    """That were there already."""


def read_prompts(path: Path) -> list[str]:
    """One prompt a line: text, or in a .jsonl file a string or an object with `prompt`. Raises RecipeError."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--prompts-file {path} cannot be read as UTF-8 ({error}); name a file with one prompt a line") from None
    lines = lines[:-1] if lines and not lines[-1] else lines
    if path.suffix != ".jsonl":
        prompts = [line.removesuffix("\r") for line in lines]
    else:
        prompts = [_prompt_of(path, number, line) for number, line in enumerate(lines, 1)]
    if not prompts:
        raise RecipeError(f"--prompts-file {path} is empty; write one prompt a line")
    return prompts


def _prompt_of(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise RecipeError(f'--prompts-file {path}, line {number}: neither a string nor an object with "prompt"; write {{"prompt": "..."}}')
    return value


def generate_file(
    loaded: LoadedNetwork,
    prompts: Sequence[str],
    output: Path,
    *,
    slots: int = SLOTS,
    length: int | None = None,
    seed: int = 0,
    stop_at_end_of_text: bool = True,
    use_cache: bool = True,
    progress: bool = False,
    **chosen: Any,
) -> Made:
    """Write `output`, or what is missing of it; `chosen` as of `SamplingOptions`. Text r is row r of `seed`.

    Collective among `loaded.peers`, of which the first writes. Raises what `generate_tokens` raises, and CheckpointError for an output that
    is another command's or cannot be written.
    """
    if slots < 1:
        raise RecipeError(f"the batch size is {slots} but must be at least 1; set {SLOTS}")
    options, length = checked(loaded, SamplingOptions(**chosen), length, seed)
    end_of_text = loaded.tokenizer.end_of_text if stop_at_end_of_text else None
    ids = loaded.tokenizer.encode_batch(prompts)
    for place, known in enumerate(ids):
        given_of(loaded.tokenizer, known, place, length)
    files = sorted((name, record.sha256) for name, record in loaded.checkpoint.index.files.items())
    said = (files, loaded.weights, loaded.objective.block_size, options, end_of_text, seed, length)
    settings = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
    if not alike(loaded, repr((settings, ids, use_cache, slots)).encode()):
        raise RecipeError(
            "the tensor-parallel ranks of one network were asked for different texts; call all with the same prompts and options"
        )
    leads = loaded.peers.rank == 0
    done = together(loaded.peers, lambda: _done(output, prompts, settings) if leads else 0, str)[0]

    def jobs() -> Iterator[Job]:
        for row in range(done, len(prompts)):
            yield Job(row, *given_of(loaded.tokenizer, ids[row], row, length), options, end_of_text)

    loaded.network.eval()
    finished = generate_each(
        loaded.network,
        loaded.objective,
        jobs(),
        slots=slots,
        longest=length,
        mask_id=loaded.tokenizer.mask_id,
        seed=seed,
        use_cache=use_cache,
        device=loaded.device,
    )
    with tqdm(total=len(prompts), initial=done, unit="text", disable=None if progress and leads else True) as bar:

        def compared() -> Iterator[Finished]:
            for one in finished:
                if not alike(loaded, one.tokens.tobytes()):
                    raise TrainingError(
                        "the tensor-parallel ranks drew different tokens from the same logits; start one process, or as many alike"
                    )
                bar.update()
                yield one

        for row, one in enumerate(in_order(compared()), done):
            if leads:
                _write(output, _line(loaded, row, prompts[row], one, settings))
    return Made(len(prompts), done)


def _line(loaded: LoadedNetwork, row: int, prompt: str, one: Finished, settings: str) -> str:
    text = loaded.tokenizer.decode(one.tokens[1:].tolist())
    known = {"row": row, "prompt": prompt, "text": text, "stop": one.stop, "prompt_tokens": one.prompt}
    return json.dumps({**known, "tokens": one.tokens.tolist(), "settings": settings}) + "\n"


def _done(output: Path, prompts: Sequence[str], settings: str) -> int:
    """Whole lines of `output`, checked to be this command's; what is behind them is cut off."""
    try:
        content = output.read_bytes() if output.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        for row, line in enumerate(lines):
            known = _parsed(line)
            expected = {"row": row, "prompt": prompts[row] if row < len(prompts) else None, "settings": settings}
            if {key: known.get(key) for key in expected} != expected:
                raise RecipeError(
                    f"--output {output}, line {row + 1}, is a text of other prompts, another network or other options, and not gone "
                    "on with; name a new file, or give the command that began it"
                )
        with output.open("ab") as file:
            file.truncate(len(whole))
    except OSError as error:
        raise RecipeError(f"--output {output} cannot be written ({error.strerror}); name another file") from None
    return len(lines)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _write(output: Path, line: str) -> None:
    try:
        with output.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise CheckpointError(f"--output {output} cannot be written ({error.strerror}); mend that and give the command again") from None
