"""Jobs for several processes, with the results in the order of the jobs.

Invariants: what comes out does not depend on the number of processes; only a few jobs are made ahead of the results, so that their source
may be longer than memory; a worker process never outlives the one that started it, even if that was killed with SIGKILL: a survivor would
hold memory for ever and write into the folder of the next start.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from bd3_scale.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int, setup: Callable[..., None] | None = None, *arguments: Any
) -> Generator[Result, None, None]:
    """`function` of each job, by `workers` processes that call `setup(*arguments)` first; with one worker, in this process.

    Close it (contextlib.closing) where not all results are taken. Raises DataError where a worker is killed, and what `function` raises.
    """
    if workers == 1:
        if setup is not None:
            setup(*arguments)
        yield from map(function, jobs)
        return
    waiting: deque[Future[Result]] = deque()
    # Not forked: tokenizers and torch have threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (setup, arguments))
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            while waiting and (waiting[0].done() or len(waiting) > 2 * workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was ended from outside (out of memory?); give the same command again, which goes on from here, "
            "with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(setup: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if setup is not None:
        setup(*arguments)
