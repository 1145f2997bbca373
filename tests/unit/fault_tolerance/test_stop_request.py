"""Signals become a flag, are given back, and only a person's second Ctrl-C interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_scale.fault_tolerance import early_exit, stop_request
from bd3_scale.fault_tolerance.stop_request import SAME_KEY_PRESS, SIGNALS, StopRequest


@dataclass
class Alone:
    world_size: int = 1
    is_main_rank: bool = True

    def all_gather(self, value: bool) -> list[bool]:
        return [value]


class Clock:
    now = 10.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stop_request, "time", clock)
    return clock


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    request = StopRequest(Alone())  # type: ignore[arg-type]
    yield request
    request.close()


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_BLOCK, ())  # a Python call, so that the handler has run


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_a_wish_and_not_an_end(number: signal.Signals, stop: StopRequest) -> None:
    assert not stop.agreed() and stop.requested is None
    send(number)
    assert stop.agreed() and stop.requested == number.name
    send(signal.SIGTERM)
    assert stop.requested == number.name, "the first signal is the reason"


def test_second_interrupt_of_a_person_interrupts(stop: StopRequest, clock: Clock) -> None:
    send(signal.SIGINT)
    clock.now += SAME_KEY_PRESS + 0.1
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_one_key_press_that_torchrun_hands_on_is_one(stop: StopRequest, clock: Clock) -> None:
    send(signal.SIGINT)
    clock.now += 0.2
    send(signal.SIGINT)
    assert stop.agreed()


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    request = StopRequest(Alone())  # type: ignore[arg-type]
    assert all(signal.getsignal(number) == request._receive for number in SIGNALS)
    request.close()
    request.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_only_the_leader_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    for leader in (False, True):
        request = StopRequest(Alone(is_main_rank=leader))  # type: ignore[arg-type]
        send(signal.SIGUSR1)
        request.close()
        assert ("SIGUSR1: stopping after this step" in capfd.readouterr().err) is leader


def test_ranks_leave_after_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, a signal reaches one of them: all leave together, and no rank waits for a question it has just asked."""
    ranks = [StopRequest(Alone(world_size=3, is_main_rank=False)) for _ in range(3)]  # type: ignore[arg-type]
    asked: list[torch.Tensor] = []  # in order: three flags per round

    class Work:
        def __init__(self, index: int) -> None:
            self.index = index

        def wait(self) -> None:
            start = self.index // 3 * 3
            assert len(asked) >= start + 3, "a rank waits before all have asked: a step would cost a round trip"
            asked[self.index].fill_(max(int(flag) for flag in asked[start : start + 3]))

    def all_reduce(flag: torch.Tensor, **options: Any) -> Work:
        assert options["async_op"] and options["op"] == torch.distributed.ReduceOp.MAX
        asked.append(flag)
        return Work(len(asked) - 1)

    monkeypatch.setattr(stop_request.dist, "all_reduce", all_reduce)
    left = []
    for step in range(4):
        if step == 2:
            send(signal.SIGTERM)  # the handler of the rank made last
        left.append([rank.agreed() for rank in ranks])
    assert ranks[2].requested == "SIGTERM" and ranks[0].requested is None
    for rank in reversed(ranks):
        rank.close()
    assert left == [[False] * 3] * 3 + [[True] * 3]


def test_agreement_is_for_ever_and_the_wall_clock_is_a_signal(clock: Clock) -> None:
    stop = StopRequest(Alone(), seconds=5)  # type: ignore[arg-type]
    assert not stop.agreed()
    clock.now += 5.1
    assert stop.agreed() and stop.requested == "run.time_limit"
    clock.now -= 10
    assert stop.agreed()
    stop.close()


def test_the_limit_counts_from_the_start_of_the_process_whatever_boot_times_say() -> None:
    code = "import psutil, time; real = psutil.Process.create_time; psutil.Process.create_time = lambda self: real(self) + 86400\n"
    code += "import bd3_scale.fault_tolerance.stop_request as s; time.time = lambda: 0.0; print(s.seconds_left(100), s.seconds_left(None))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left, none = ended.stdout.split()
    assert 0 < float(left) < 100 and none == "None"


WAITING_FOR_PEERS = """
import datetime, sys, torch.distributed as dist
from bd3_scale.fault_tolerance.early_exit import exit_on_early_signal
with exit_on_early_signal(leader=True):
    print("waiting", flush=True)
    dist.TCPStore("localhost", 0, 2, True, timeout=datetime.timedelta(seconds=60), wait_for_workers=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_training_a_signal_leaves_with_0_even_from_inside_a_collective(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WAITING_FOR_PEERS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and f"{number.name}: leaving" in errors


def test_handlers_stand_before_torch_is_imported() -> None:
    """The import takes seconds; a signal meanwhile would end the process with another status than 0."""
    code = "import sys, bd3_scale.train, bd3_scale.fault_tolerance.early_exit; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_signal_that_nobody_has_acted_on_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that ends the process may wake up only when a request listens already."""
    monkeypatch.setattr(early_exit, "heard", [signal.SIGTERM])
    request = StopRequest(Alone())  # type: ignore[arg-type]
    assert request.agreed() and request.requested == "SIGTERM"
    request.close()


LEFT_BY_OTHERS = """
import os, signal, sys
from bd3_scale.fault_tolerance import early_exit, stop_request
class Layout:
    world_size, is_main_rank, calls = 2, False, 0
    def all_gather(self, value):
        self.calls += 1
        if self.calls == calls:
            if told == "told": os.kill(os.getpid(), signal.SIGTERM)
            if told == "other": return [value, True]
            raise RuntimeError("Connection closed by peer")
        return [value, value]
calls, told = int(sys.argv[1]), sys.argv[2]
with early_exit.exit_on_early_signal(leader=False):
    stop_request.StopRequest(Layout()).close()
    assert told == "other"
sys.exit(3)
"""


@pytest.mark.parametrize("call", [1, 2], ids=["beginning", "ceasing"])
@pytest.mark.parametrize(("told", "status"), [("told", 0), ("alone", 1)])
def test_rank_that_others_left_leaves_in_order_only_if_it_was_told(call: int, told: str, status: int) -> None:
    """As it begins and ceases to listen: others, who did not listen, may have left at once."""
    command = [sys.executable, "-W", "ignore", "-c", LEFT_BY_OTHERS, str(call), told]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == status, ended.stderr


def test_all_leave_where_one_was_told_too_late_for_the_loop() -> None:
    command = [sys.executable, "-W", "ignore", "-c", LEFT_BY_OTHERS, "2", "other"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=100).returncode == 0


ENDING = """
import os, signal, sys, time
from bd3_scale import train
train.run = lambda recipe, device: None
status = train.main()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
sys.exit(status)
"""


@pytest.mark.parametrize(("override", "status"), [("training.steps=1", 0), ("training.steps=oops", 2)])
def test_signal_while_the_process_ends_does_not_change_its_status(override: str, status: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", ENDING, "recipes/quickstart.yaml", override]
    assert subprocess.run(command, capture_output=True, timeout=100, cwd=Path(__file__).parents[3]).returncode == status
