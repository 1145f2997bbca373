"""A store that answers wrongly: between a client and an S3 server on loopback, it passes requests on and spoils chosen answers.

Only answers to reads of an object are spoiled, of names that a fault picks and as often as it says. Everything else goes through as it is.
"""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("cut", "short", "replaced", "503", "slow", "stalled")
"""The connection ends in the middle | the object is half as long | its second half is that of another | SlowDown | a pause in the middle |
a longer one than the client waits."""
PAUSES = {"slow": 0.3, "stalled": 2.5}
ALWAYS = 1 << 30


@dataclass
class Fault:
    """`times` answers to reads of objects whose key ends with `suffix` are spoiled; `met`: those that were."""

    kind: str
    suffix: str
    times: int
    met: int = 0


class FaultyStore(ThreadingHTTPServer):
    """Listens on a free port and passes on to `endpoint`."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(endpoint).netloc
        self.fault: Fault | None = None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is no news."""

    def taken(self, path: str) -> str | None:
        """What becomes of an answer to a read of `path`."""
        with self.lock:
            fault = self.fault
            if fault is None or not path.partition("?")[0].endswith(fault.suffix) or fault.met >= fault.times:
                return None
            fault.met += 1
            return fault.kind


class _Handler(BaseHTTPRequestHandler):
    server: FaultyStore

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = http.client.HTTPConnection(self.server.behind, timeout=30)
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        content, headers = answer.read(), dict(answer.getheaders())
        kind = self.server.taken(self.path) if self.command == "GET" and answer.status in (200, 206) and content else None
        status, half = answer.status, len(content) // 2
        if kind == "503":
            content, status = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>", 503
        elif kind == "short":
            content = content[:half]
        elif kind == "replaced":
            content = content[:half] + bytes(byte ^ 1 for byte in content[half:])
        self.send_response_only(status)
        spoiled = kind is not None
        for name, value in headers.items():
            # What the store says of the content would give a spoiled one away before it is looked at.
            if name.lower() not in ("content-length", "transfer-encoding", "connection") and not (
                spoiled and name.lower().startswith("x-amz-checksum")
            ):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)) if self.command != "HEAD" else headers.get("Content-Length", "0"))
        self.send_header("Connection", "close")
        self.end_headers()
        if kind in ("cut", *PAUSES):
            self.wfile.write(content[:half])
            self.wfile.flush()
            if kind == "cut":
                return
            time.sleep(PAUSES[kind])
            content = content[half:]
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on
