"""Run a test's script on several ranks that are forked from one process, which has imported everything already.

torch, DeepSpeed and megatron-core take a core four seconds to import: on two cores a start of four ranks by torchrun takes longer than
what most tests then do. `launch` is for what torchrun itself has a part in (commands, signals, lost ranks); this is for scripts.

Invariants: a rank is a process of its own, with the environment that torchrun gives it; nothing was computed and no thread was running
where it was forked; a rank that fails ends the others; whatever happens, no process outlives the tests: the server ends its job when its
input ends.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, NoReturn

from tests.distributed.launch import ROOT, Finished, give_turn, take_turn

_servers: list[subprocess.Popen[bytes]] = []
"""That of this process of pytest, once it has one."""


def run_ranks(world_size: int, arguments: list[str], log: Path, timeout: float = 300) -> Finished:
    """`arguments`: a script and what it is given. Raises AssertionError with its output where it takes longer than `timeout` seconds."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    if world_size > 1:
        take_turn(world_size)
    server.stdin.write(json.dumps([world_size, arguments, str(log), dict(os.environ)]).encode() + b"\n")
    server.stdin.flush()
    try:
        if not select.select([server.stdout], [], [], timeout)[0]:
            _end(server)  # so that its ranks say where they are
            raise AssertionError(f"not finished after {timeout} s:\n{log.read_text()[-20000:]}")
        return Finished(json.loads(server.stdout.readline()), log.read_text())
    except BaseException:
        _end(server)
        raise
    finally:
        give_turn()


def _server() -> subprocess.Popen[bytes]:
    if not _servers:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.distributed.forked"]
        _servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment))
        atexit.register(_end, _servers[0])
    return _servers[0]


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    if server in _servers:
        _servers.remove(server)


# -- The server --------------------------------------------------------------------------------------------------------


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Run one job after another until the requests end."""
    for request in iter(requests.readline, b""):
        job = os.fork()
        if job == 0:
            requests.close()
            answers.close()
            _run_job(*json.loads(request))
        status = None
        while status is None:
            ended, code = os.waitpid(job, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
            elif select.select([requests], [], [], 0.05)[0]:  # nothing is asked before the answer: the tests have ended
                with contextlib.suppress(ProcessLookupError):  # it is just beginning, or has ended
                    os.killpg(job, signal.SIGQUIT)
                    time.sleep(1.0)
                    os.killpg(job, signal.SIGKILL)
                return
        answers.write(json.dumps(status).encode() + b"\n")
        answers.flush()


def _run_job(world_size: int, arguments: list[str], log: str, environment: dict[str, str]) -> NoReturn:
    """The ranks and their end, in a session of their own; leaves with the status of the first that failed, or 0."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.register(signal.SIGQUIT, file=2)  # all threads of a rank that hangs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS", "DS_ACCELERATOR")}
    os.environ.clear()
    os.environ.update(environment | ours | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    ranks = set()
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            _run_rank(arguments, {name: str(number) for name, number in place.items()})
        ranks.add(pid)
    failed = 0
    while ranks:
        pid, code = os.wait()
        ranks.discard(pid)
        status = os.waitstatus_to_exitcode(code)
        if status and not failed:
            failed = status if status > 0 else 128 - status
            time.sleep(1.0)  # what the others have to say of it
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    os._exit(failed)


def _run_rank(arguments: list[str], place: dict[str, str]) -> NoReturn:
    os.environ.update(place)
    sys.argv, status = arguments, 0
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    # Of their own, so that no script meets them.
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401 - optimizers and DeepSpeed want it

    from bd3_scale.data.formats.streaming_compat import import_streaming

    import_streaming()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread that a fork would leave behind"
    gc.freeze()  # no collection looks at what was imported
    serve(requests, answers)


if __name__ == "__main__":
    main()
