"""`bd3 VERB ...`, the same as `python -m bd3_scale VERB ...` and `python -m bd3_scale.VERB ...`: every command under one name.

Invariant: a verb is the module of its name, run as a program; nothing is imported for a verb that was not asked for.
"""

from __future__ import annotations

import difflib
import os
import runpy
import select
import signal
import sys

from bd3_scale import __version__
from bd3_scale.errors import RecipeError
from bd3_scale.program import run_program

VERBS = {
    "train": "train a model by a recipe, alone or under torchrun",
    "prepare": "make a data folder from text, look into one, or check one",
    "sample": "text from a checkpoint",
    "evaluate": "likelihood and generative perplexity of a checkpoint",
    "plan": "memory, time and price of a run on a cluster; no GPU needed",
    "launch": "start a run on nodes by torchrun, SLURM or Kubernetes",
    "doctor": "whether this machine, recipe and data are fit to train",
    "convert": "weights from elsewhere into a checkpoint, and out again",
    "inspect": "what a checkpoint holds, verified",
    "plot": "the plots of one or several runs",
    "recipe": "what the keys of a recipe mean",
}
"""Module of bd3_scale -> what it does."""


def main() -> int:
    """Run the verb of the command line; it ends the process with its own status. Returns that of a question, or of an unknown verb."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in VERBS:
        sys.argv = [f"bd3 {verb}", *sys.argv[2:]]
        try:
            runpy.run_module(f"bd3_scale.{verb}", run_name="__main__", alter_sys=False)
        except (BrokenPipeError, SystemExit):
            if not _reader_left():
                raise
            return 128 + signal.SIGPIPE
        return 0
    if verb in ("--help", "-h", "help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
        print(f"usage: bd3 VERB ...; bd3 VERB --help says more\n\n{verbs}")
        return 0
    if verb in ("--version", "-V"):
        print(f"bd3_scale {__version__}")
        return 0
    near = difflib.get_close_matches(verb, VERBS, 1) or ["--help"]
    return RecipeError(f"{verb!r} is no verb; name one of {', '.join(VERBS)}: bd3 {near[0]}, for example").say("bd3")


def _reader_left() -> bool:
    """Whether nobody reads the output any more (`bd3 plan ... | head`), which is no error of ours; the rest goes nowhere then."""
    output = select.poll()
    output.register(1, select.POLLOUT)
    left = any(event & select.POLLERR for _, event in output.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return left


if __name__ == "__main__":
    run_program(main)
