"""A model hub on loopback for the real hub client, which plays what goes wrong between here and there.

Faults match a request as "METHOD path" with wildcards, act in the order in which they were set, and wear out after `times` requests:

    hub.add("dataset", "org/pile", {"train.jsonl.zst": rows})
    hub.cut("GET *train.jsonl.zst", after_bytes=5000, times=2)

Tokens are compared and never kept: `hub.requests` says whether a request carried one.
"""

from __future__ import annotations

import math
import os
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session, file_download, hf_api
from huggingface_hub.utils import _http as client_http

from tests.hub_repositories import Reply, Repositories, error

DIRECT = "127.0.0.1,localhost"


@dataclass
class Request:
    """`status` is None until there is an answer, and stays so if the connection is dropped before one."""

    method: str
    path: str
    range: str | None
    authorized: bool
    status: int | None = None


@dataclass
class Fault:
    pattern: str
    times: float
    status: int | None = None
    retry_after: int | None = None
    seconds: float = 0.0
    keep: int | None = None  # bytes of the body that are sent before the connection ends or hangs; -1: not even the head
    reset: bool = False
    corrupt: bool = False
    missing: int = 0


def ranged(reply: Reply, wanted: str | None) -> Reply:
    """The bytes that a Range header of one range asks for: 206, or 416 if it starts behind the end."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if match is None or reply.status != 200:
        return reply
    total, (first, last) = len(reply.body), match.groups()
    start = int(first) if first else max(total - int(last), 0)
    end = min(int(last) + 1 if first and last else total, total)
    if start >= total:
        return Reply(416, {"Content-Range": f"bytes */{total}"})
    return Reply(206, reply.headers | {"Content-Range": f"bytes {start}-{end - 1}/{total}"}, reply.body[start:end])


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, one connection for each request: `down` then refuses the next one for certain."""

    server: Server

    def do_GET(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.command, unquote(parts.path), self.headers.get("Range"), token is not None)
        hub.requests.append(request)
        fault = hub.next_fault(f"{request.method} {request.path}")
        if fault.keep is None and hub.closing.wait(fault.seconds):
            return
        if fault.status:
            wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            reply = error(fault.status, None, f"the hub says {fault.status}", **wait)
        else:
            reply = hub.answer(parts.path, parse_qs(parts.query or body.decode()), token)
        reply = reply._replace(body=reply.body[: len(reply.body) - fault.missing])
        self.send(ranged(reply, request.range), fault, request)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def send(self, reply: Reply, fault: Fault, request: Request) -> None:
        if fault.keep != -1:
            request.status = reply.status
            self.send_response(reply.status)
            for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                body = bytes([*reply.body[:-1], reply.body[-1] ^ 1]) if fault.corrupt and reply.body else reply.body
                self.wfile.write(body[: fault.keep])
                if fault.seconds and fault.keep is not None:
                    self.server.hub.closing.wait(fault.seconds)
                    self.wfile.write(body[fault.keep :])
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def log_message(self, *args: object) -> None:
        """Nothing is printed; `hub.requests` keeps what tests need."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, hub: Hub, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.hub = hub
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is part of the play; a mistake of this file is kept for the end of the test."""
        problem = sys.exc_info()[1]
        if not isinstance(problem, ConnectionError):
            self.hub.mistakes.append(problem)


class Hub(Repositories):
    """The hub and its CDN. `requests` in order of arrival; `waits`: seconds that a connected client would have slept."""

    NONE: ClassVar[Fault] = Fault("", 0)

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.waits: list[float] = []
        self.faults: list[Fault] = []
        self.mistakes: list[BaseException | None] = []
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.servers = [Server(self), Server(self)]
        self.ports = [server.server_port for server in self.servers]
        self.parked: list[socket.socket] = []
        self.cdn = f"http://localhost:{self.ports[1]}"  # another host: the client sends no token there

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def fail(self, pattern: str, status: int, times: float = math.inf, retry_after: int | None = None) -> None:
        self.faults.append(Fault(pattern, times, status=status, retry_after=retry_after))

    def hang(self, pattern: str, seconds: float, times: float = math.inf, *, after_bytes: int | None = None) -> None:
        """Answer late, or stop so long inside the body."""
        self.faults.append(Fault(pattern, times, seconds=seconds, keep=after_bytes))

    def cut(self, pattern: str, after_bytes: int, times: float = math.inf, *, reset: bool = False) -> None:
        """End the connection inside a body, whose full length was announced; with `reset` as a router would, by RST."""
        self.faults.append(Fault(pattern, times, keep=after_bytes, reset=reset))

    def drop(self, pattern: str, times: float = math.inf) -> None:
        """End the connection without any answer."""
        self.faults.append(Fault(pattern, times, keep=-1))

    def corrupt(self, pattern: str, times: float = math.inf) -> None:
        """Send one wrong bit; length, ETag and listed hashes stay those of the right file."""
        self.faults.append(Fault(pattern, times, corrupt=True))

    def shorten(self, pattern: str, by: int = 1, times: float = math.inf) -> None:
        """Send a file that lacks its end as if it were whole."""
        self.faults.append(Fault(pattern, times, missing=by))

    def next_fault(self, line: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fnmatchcase(line, fault.pattern):
                    fault.times -= 1
                    return fault
        return self.NONE

    def down(self) -> None:
        """Refuse connections. The ports stay bound, so that nobody else gets them meanwhile."""
        self.stop()
        self.parked = [bound(port) for port in self.ports]

    def up(self) -> None:
        self.stop()
        self.servers = [Server(self, port) for port in self.ports]

    def stop(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for place in self.parked:
            place.close()
        self.servers, self.parked = [], []

    def close(self) -> None:
        self.closing.set()
        self.stop()
        assert not self.mistakes, self.mistakes

    @property
    def environment(self) -> dict[str, str]:
        """For the client of another process: it reads these once, while it is imported."""
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "", "HF_OIDC_RESOURCE": ""}
        return {"HF_ENDPOINT": self.endpoint, "NO_PROXY": DIRECT, "no_proxy": DIRECT, **switches}

    def connect(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Point the client of this process here, without tokens of its own, and let it note its waits instead of sleeping."""
        constants = huggingface_hub.constants
        patch.setattr(constants, "ENDPOINT", self.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(hf_api.api, "endpoint", self.endpoint)  # behind the functions without a class, such as model_info
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_PROGRESS_BARS": True}.items():
            patch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            patch.delenv(name, raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, DIRECT)
        clock = SimpleNamespace(**{**vars(time), "sleep": self.waits.append})
        patch.setattr(client_http, "time", clock)
        patch.setattr(file_download, "time", clock)
        close_session()  # what is open still knows the old proxies


def set_timeouts(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the client wait this long for an answer, in all three phases of hf_hub_download (10, 60 and 10 s otherwise)."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", seconds)
    patch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", seconds)
    patch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)


def bound(port: int) -> socket.socket:
    """A socket that holds a port and refuses everybody."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", port))
    return place
