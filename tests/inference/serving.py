"""A server on this machine, in a thread or a process of its own, and requests to it byte by byte."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from doge_lm.data.tokenizer import load_tokenizer
from doge_lm.inference.gate import Access
from doge_lm.inference.loading import load_model
from doge_lm.inference.serve import Server, listening_socket
from doge_lm.inference.server import Running, Settings, create_app
from doge_lm.inference.service import Limits
from doge_lm.inference.slots import Slots
from tests.conftest import REPOSITORY


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has the form that OpenAI's have."""
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        assert self.headers["content-type"] == "application/json"
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Those of a stream that is whole."""
        assert self.headers["content-type"].startswith("text/event-stream")
        *parts, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(part.removeprefix("data: ")) for part in parts]


@dataclass
class Serving:
    """A server that runs."""

    port: int
    model: str
    running: Running | None = None
    server: Server | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        raw: bytes | None = None,
    ) -> Reply:
        """One request on a connection of its own."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            given = {"content-type": "application/json"} if data is not None else {}
            connection.request(method, path, data, {**given, **self.headers, **(headers or {})})
            response = connection.getresponse()
            return Reply(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Reply:
        return self.ask("POST", path, {"model": self.model, **body})

    def complete(self, prompt: Any = "Once upon a time", **body: Any) -> Reply:
        return self.post("/v1/completions", prompt=prompt, **body)

    def chat(self, content: Any = "Hello", **body: Any) -> Reply:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        found = re.search(rf"^{name} (\S+)$", self.ask("GET", "/metrics").body.decode(), flags=re.MULTILINE)
        assert found
        return float(found.group(1))

    def wait_until_idle(self) -> None:
        while self.metric("doge_lm_running") or self.metric("doge_lm_waiting"):
            time.sleep(0.02)

    def wait_until_answered(self) -> None:
        """Until no request is under way: one is counted for a moment after its answer has been read."""
        assert self.running is not None
        deadline = time.monotonic() + 60
        while self.running.state.requests:
            assert time.monotonic() < deadline, f"requests under way: {self.running.state.requests}"
            time.sleep(0.01)

    def wait_until_gone(self) -> None:
        """Until nobody can connect."""
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=60).close()
            except ConnectionRefusedError:
                return
            time.sleep(0.01)

    def take_signal(self) -> None:
        """As if the process had got one that asks it to end."""
        assert self.server is not None
        self.server.handle_exit(signal.SIGTERM, None)

    def finished(self, path: str, status: int) -> int:
        """How many requests of a path have been answered in whole."""
        text = self.ask("GET", "/metrics").body.decode()
        labels = re.escape(f'{{method="POST",path="{path}",status="{status}"}}')
        found = re.search(rf"^doge_lm_requests_total{labels} (\S+)$", text, flags=re.MULTILINE)
        return int(float(found.group(1))) if found else 0

    def begin_stream(self, max_tokens: int, prompt: str = "Once upon a time", **options: Any) -> socket.socket:
        """A stream that has begun, as a bare socket with a small buffer."""
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "stream": True,
                "max_tokens": max_tokens,
                "temperature": 0,
                **options,
            }
        )
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        received = b""
        while b"data: " not in received:
            received += connection.recv(4096)
        assert received.startswith(b"HTTP/1.1 200"), received
        return connection


def rest_of(connection: socket.socket) -> bytes:
    """All that still comes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


@contextmanager
def serving(
    place: Path,
    *,
    slots: int = 8,
    context: int = 256,
    max_tokens: int | None = None,
    queue: int = 64,
    drain_seconds: float = 5.0,
    **access: Any,
) -> Iterator[Serving]:
    """A server in a thread, whose connections have small buffers."""
    model = load_model(place, torch.device("cpu"), "float32")
    settings = Settings(place.name, Limits(context, max_tokens or context), Access(**access), queue, threads=1)
    running, started = Running(), threading.Event()
    app = create_app(Slots(model, slots, context), load_tokenizer(place), settings, running)
    server = Server(app, running, drain_seconds, started.set)
    with listening_socket("127.0.0.1", 0) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        assert started.wait(60)
        try:
            yield Serving(port, place.name, running, server)
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


@contextmanager
def serving_process(place: Path, *flags: str, environment: dict[str, str] | None = None) -> Iterator[Any]:
    """`doge-lm serve` in a process of its own: the server, and the process."""
    path = os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "doge_lm.cli", "serve", str(place), "--port", "0", "--device", "cpu", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.match(r"API +http://\S+:(\d+)/v1", line)
            if found:
                yield Serving(int(found.group(1)), place.name), process
                break
        else:
            raise AssertionError(f"the server ended with status {process.wait()}")
    finally:
        process.kill()
        process.wait()
