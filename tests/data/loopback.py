"""Servers on loopback that stand in for the hub and for the Software Heritage bucket."""

import gzip
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves on a free port of 127.0.0.1; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


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
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

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


def hub_handler(repositories: dict[str, dict[str, bytes]]) -> type[BaseHTTPRequestHandler]:
    """A hub of data sets: as much of its HTTP interface as `datasets` needs for streaming.

    Args:
        repositories: by name (`owner/name`), the files by path.
    """
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
                case [] | ["revision", "main"]:
                    self.reply_json(repository.information())
                case ["revision", revision] if revision == repository.sha:
                    self.reply_json(repository.information())
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
            content = repository.files[path]
            oid = repository.file(path)["oid"]
            headers = {"X_Repo_Commit": repository.sha, "ETag": f'"{oid}"', "Accept_Ranges": "bytes"}
            wanted = self.headers.get("Range")
            if wanted is None:
                self.reply(200, content, **headers)
                return
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end) if end else len(content) - 1, len(content) - 1)
            part = content[int(begin) : last + 1]
            self.reply(206, part, Content_Range=f"bytes {begin}-{last}/{len(content)}", **headers)

        def reply_json(self, value: object) -> None:
            self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    return Hub


def bucket_handler(contents: dict[str, bytes], failures: dict[str, list[int | str]]) -> type[BaseHTTPRequestHandler]:
    """A bucket of contents by blob id.

    Args:
        contents: blob id -> text, served as gzip.
        failures: blob id -> what the next requests for it meet: a status, or "cut" for a body that breaks off.
    """

    class Bucket(_Quiet):
        def do_GET(self) -> None:
            blob = self.path.removeprefix("/content/")
            if failures.get(blob):
                failure = failures[blob].pop(0)
                if failure == "cut":
                    self.reply(200, gzip.compress(contents[blob])[:-6])
                else:
                    self.reply(int(failure))
            elif blob in contents:
                self.reply(200, gzip.compress(contents[blob]))
            else:
                self.reply(404)

    return Bucket
