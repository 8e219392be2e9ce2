"""Servers on loopback that stand in for the hub and for the Software Heritage bucket."""

import gzip
import hashlib
import io
import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq


class _Server(ThreadingHTTPServer):
    """A server that says nothing of clients that hang up."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves on a free port of 127.0.0.1; gives the address."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class Fault:
    """What one request meets.

    Attributes:
        status: of the answer; below 400, the body is what it should be, but for `how`.
        retry_after: the header of that name.
        after: bytes of the body that are sent before it happens.
        how: a reset, an end of the connection, silence until the client goes away, or bytes that are altered.
    """

    status: int = 200
    retry_after: str = ""
    after: int = 0
    how: Literal["reset", "cut", "stall", "alter"] | None = None


@dataclass
class Log:
    """What a server met: the requests by path, their ranges and tokens, and the bytes of bodies it sent by path."""

    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # status, headers and body in one packet

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def meet(self, fault: Fault, body: bytes, **headers: str) -> int:
        """Answers as a fault says; gives the bytes of the body that were sent."""
        if fault.status >= 400:
            self.reply(fault.status, **({"Retry-After": fault.retry_after} if fault.retry_after else {}))
            return 0
        if fault.how == "alter":
            self.reply(fault.status, bytes(byte ^ 1 for byte in body), **headers)
            return len(body)
        self.send_response(fault.status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: fault.after])
        self.wfile.flush()
        self.close_connection = True
        if fault.how == "stall":
            self.connection.settimeout(5)
            self.connection.recv(1)  # nothing comes until the client hangs up
        elif fault.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        return fault.after


def parquet(columns: dict[str, list[Any]]) -> bytes:
    """A table as a parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def hub_files(configs: dict[str, dict[str, list[Any]]]) -> dict[str, bytes]:
    """The files of a repository: a parquet file for each configuration, and the card that names them.

    A repository of one configuration calls it `default`.
    """
    cards = [{"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*"}]} for name in configs]
    tables = {f"{name}/train-00000-of-00001.parquet": parquet(columns) for name, columns in configs.items()}
    return {"README.md": f"---\nconfigs: {json.dumps(cards)}\n---\n".encode(), **tables}


@dataclass(frozen=True)
class Repository:
    """A data set of the hub: its name, and its files by path."""

    name: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        """Its one commit."""
        return hashlib.sha1(self.name.encode()).hexdigest()

    def information(self) -> dict[str, Any]:
        """What the hub says of it."""
        siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
        return {"id": self.name, "sha": self.sha, "siblings": siblings, "private": False, "tags": []}

    def file(self, path: str) -> dict[str, Any]:
        """What the hub says of a file."""
        content = self.files[path]
        size = len(content)
        git_id = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
        values: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": git_id}
        if path.endswith(".parquet"):
            values["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
        return values

    def folder(self, path: str) -> dict[str, Any]:
        """What the hub says of a folder."""
        return {"type": "directory", "path": path, "size": 0, "oid": self.sha}

    def list_folder(self, below: str) -> list[dict[str, Any]]:
        """The files and folders directly in a folder; "" is the topmost."""
        prefix = f"{below}/" if below else ""
        inside = [name for name in self.files if name.startswith(prefix)]
        folders = {prefix + name.removeprefix(prefix).split("/")[0] for name in inside if "/" in name[len(prefix) :]}
        files = [self.file(name) for name in inside if "/" not in name[len(prefix) :]]
        return files + [self.folder(name) for name in folders]

    def list_paths(self, wanted: list[str]) -> list[dict[str, Any]]:
        """Those of the paths that are there."""
        folders = {name.rsplit("/", 1)[0] for name in self.files if "/" in name}
        found = [self.file(name) for name in wanted if name in self.files]
        return found + [self.folder(name) for name in wanted if name in folders]


def hub_handler(
    repositories: dict[str, dict[str, bytes]],
    faults: dict[str, list[Fault]] | None = None,
    log: Log | None = None,
    *,
    ranges: bool = True,
    files_at: str = "",
) -> type[BaseHTTPRequestHandler]:
    """A hub of data sets: as much of its HTTP interface as `datasets` and `download_datasets` need.

    Args:
        repositories: by name (`owner/name`), the files by path.
        faults: what the next requests for a file (by its path) meet; "information" and "tree" stand for what is said of
            a repository, and the list of its files.
        log: what is written down of the requests for files.
        ranges: requests for a part of a file are understood, and not answered with the whole.
        files_at: the address to which requests for files are redirected.
    """
    plagued, written = faults or {}, log or Log()
    known = {name: Repository(name, files) for name, files in repositories.items()}

    class Hub(_Quiet):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            match self.parts():
                case ["api", "datasets", owner, name, "paths-info", *_] if f"{owner}/{name}" in known:
                    self.reply_json(known[f"{owner}/{name}"].list_paths(json.loads(body)["paths"]))
                case _:
                    self.reply(404)

        def answer(self) -> None:
            match self.parts():
                case ["datasets", owner, name, "resolve", _, *path] if f"{owner}/{name}" in known:
                    self.send_file(known[f"{owner}/{name}"], "/".join(path))
                case ["api", "datasets", owner, name, *rest] if f"{owner}/{name}" in known:
                    self.answer_about(known[f"{owner}/{name}"], rest)
                case _:
                    self.reply(404)

        def answer_about(self, repository: Repository, rest: list[str]) -> None:
            match rest:
                case [] if plagued.get("information"):
                    self.meet(plagued["information"].pop(0), b"")
                case [] | ["revision", "main"]:
                    self.reply_json(repository.information())
                case ["revision", revision] if revision == repository.sha:
                    self.reply_json(repository.information())
                case ["tree", *_] if plagued.get("tree"):
                    self.meet(plagued["tree"].pop(0), b"")
                case ["tree", _] if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true":
                    self.reply_json([repository.file(name) for name in repository.files])
                case ["tree", _, *path]:
                    self.reply_json(repository.list_folder("/".join(path)))
                case _:
                    self.reply(404)

        def parts(self) -> list[str]:
            return [part for part in unquote(urlsplit(self.path).path).split("/") if part]

        def send_file(self, repository: Repository, path: str) -> None:
            if path not in repository.files:
                self.reply(404, X_Error_Code="EntryNotFound")
                return
            written.requests.append(path)
            written.tokens.append(self.headers.get("Authorization"))
            if files_at:
                self.reply(302, Location=files_at + self.path)
                return
            content = repository.files[path]
            oid = repository.file(path)["oid"]
            headers = {"X_Repo_Commit": repository.sha, "ETag": f'"{oid}"', "Accept_Ranges": "bytes"}
            wanted = self.headers.get("Range") if ranges else None
            status = 200
            if wanted is not None:
                written.ranges.append(wanted)
                begin, _, end = wanted.removeprefix("bytes=").partition("-")
                if int(begin) >= len(content):
                    self.reply(416, Content_Range=f"bytes */{len(content)}")
                    return
                last = min(int(end) if end else len(content) - 1, len(content) - 1)
                headers["Content_Range"] = f"bytes {begin}-{last}/{len(content)}"
                status, content = 206, content[int(begin) : last + 1]
            sent = len(content)
            if plagued.get(path):
                fault = plagued[path].pop(0)
                sent = self.meet(replace(fault, status=max(fault.status, status)), content, **headers)
            else:
                self.reply(status, content, **headers)
            written.sent[path] = written.sent.get(path, 0) + sent

        def reply_json(self, value: object) -> None:
            self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    return Hub


def bucket_handler(
    contents: dict[str, bytes], faults: dict[str, list[Fault]], log: Log | None = None
) -> type[BaseHTTPRequestHandler]:
    """A bucket of contents by blob id.

    Args:
        contents: blob id -> text, served as gzip.
        faults: blob id -> what the next requests for it meet.
        log: the blob ids that were asked for.
    """
    written = log or Log()

    class Bucket(_Quiet):
        def do_GET(self) -> None:
            blob = self.path.removeprefix("/content/")
            written.requests.append(blob)
            if faults.get(blob):
                self.meet(faults[blob].pop(0), gzip.compress(contents.get(blob, b"")))
            elif blob in contents:
                self.reply(200, gzip.compress(contents[blob]))
            else:
                self.reply(404)

    return Bucket
