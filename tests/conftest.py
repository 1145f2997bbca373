"""What all tests share: quiet single-threaded torch, and a world of one process for code that needs process groups."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("repeatable")
"""A run of the tests is a function of the commit; `pytest --hypothesis-profile=random` looks at other examples."""


@pytest.fixture(scope="session")
def world_of_one() -> Iterator[object]:
    """A `Layout` of one CPU process (gloo, no port)."""
    from bd3_scale.distributed import layout
    from bd3_scale.recipe.schema import ParallelConfig

    yield layout.start(ParallelConfig(), "cpu")
    layout.stop()


@pytest.fixture(autouse=True)
def _notes_are_heard() -> Iterator[None]:
    """`caplog` has what the package says, whatever command ran in this process before."""
    log = logging.getLogger("bd3_scale")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.INFO)
    yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as lines of a table (`record_property("table", line)`), also where workers ran them."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    lines = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "table"]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
