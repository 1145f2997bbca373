"""A command as a process is quick by leaving the collector out, and is otherwise what Python makes of `sys.exit(main())`."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMAND = """
import atexit, gc, threading, time, weakref
from bd3_scale.program import run_program

class Node: pass

def main():
    atexit.register(print, "registered")
    node = Node()
    node.itself, seen = node, weakref.ref(node)
    del node
    kept = [[] for _ in range(300_000)]
    print("collected" if seen() is None else "kept")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    BODY

run_program(main)
"""


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [("return 0", 0, ""), ("return 3", 3, ""), ("raise ValueError('why')", 1, "ValueError: why"), ("raise SystemExit(2)", 2, "")],
)
def test_it_ends_as_any_program(body: str, status: int, error: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND.replace("BODY", body)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (status, ["collected", "thread", "registered"])
    assert done.stderr.strip().endswith(error) and bool(done.stderr) == bool(error)


def test_what_the_collector_has_seen_is_not_looked_at_again_at_the_end() -> None:
    """A cycle that lives to the end is left to the system: its finalizer, which Python would call, does not run."""
    body = "Node.__del__ = lambda self: print('looked at'); last = Node(); last.itself = last; return 0"
    done = subprocess.run([sys.executable, "-c", COMMAND.replace("BODY", body)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["collected", "thread", "registered"]
