"""Files of a data set on the Hugging Face hub: which ones a configuration has, and fetching them whole or not at all.

The revision is pinned when the files are listed. A file is fetched into `NAME.part` and goes on from there after an
interruption; it takes its own name only when its size and its hash are those that the hub states: SHA-256 where it is
stored as a large file, Git's object id otherwise.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from doge_lm.data.manifest import FULL_DISK
from doge_lm.data.sources import CatalogueEntry
from doge_lm.data.transfer import Client, DiskGuard, FaultError, Patience, RefusalError, seconds_to_wait
from doge_lm.errors import UserError

DATA_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")

_SPLIT = "train"
_CARD = "README.md"
_DISK_CHECK_BYTES = 2**24
_MISMATCHES = 2

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its path there, its size, and Git's id or the SHA-256 of its content ("" if unknown)."""

    path: str
    size: int
    git_id: str
    sha256: str = ""


@dataclass(frozen=True)
class Listing:
    """The files of a configuration at one revision (the id of a commit), in the order of their rows."""

    revision: str
    files: tuple[HubFile, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Listing":
        """From what `to_json` gave."""
        return cls(values["revision"], tuple(HubFile(**file) for file in values["files"]))


class Hub:
    """The hub, or another one that `HF_ENDPOINT` names.

    Args:
        client: what fetches.
        retries: how often a fault may follow another without a new byte in between.
        guard: looks after the disk.
    """

    def __init__(self, client: Client, retries: int, guard: DiskGuard) -> None:
        from huggingface_hub import HfApi, constants, get_token  # noqa: PLC0415 - of no use for --local

        self._client = client
        self._retries = retries
        self._guard = guard
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._token = get_token()
        self._api = HfApi(endpoint=self._endpoint, token=self._token)

    def list_files(self, entry: CatalogueEntry) -> Listing:
        """Pins the newest revision, and lists the files of a source's configuration there.

        Raises:
            UserError: if the hub refuses or cannot be reached, or there is no such file.
        """
        sha = self._ask(entry, lambda: self._api.dataset_info(entry.hub_id).sha)
        if sha is None:
            raise UserError(f"{entry.hub_id}: the hub states no revision")
        tree = self._ask(
            entry,
            lambda: list(self._api.list_repo_tree(entry.hub_id, recursive=True, revision=sha, repo_type="dataset")),
        )
        # Folders have no size.
        files = {item.path: item for item in tree if hasattr(item, "size")}
        card = b""
        if _CARD in files:
            try:
                card = self._client.get(self._url(entry, sha, _CARD), self._retries, self._headers())
            except RefusalError as refusal:
                raise self._refused(entry, refusal) from refusal
        chosen = choose_files(list(files), card_configs(card.decode("utf-8", "replace")), entry.config)
        if not chosen:
            wanted = "" if entry.config is None else f" of the configuration {entry.config}"
            raise UserError(f"{entry.hub_id} has no file{wanted} that can be read ({', '.join(DATA_SUFFIXES)})")
        return Listing(sha, tuple(_hub_file(files[path]) for path in chosen))

    def fetch(self, entry: CatalogueEntry, revision: str, file: HubFile, target: Path) -> None:
        """Fetches a file to a place, whole or not at all; what is in `target.part` already is not fetched again.

        Raises:
            UserError: if the hub refuses, faults do not end, the content is not what the hub states, or the disk is or
                would get too full.
            StoppedError: if the client was stopped.
        """
        try:
            self._fetch(entry, revision, file, target)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise UserError(
                f"the disk is full ({error.strerror}): {target} could not be fetched; what is there of it is kept: "
                "free some space and run the same command again, or choose another --cache_dir"
            ) from error

    def _fetch(self, entry: CatalogueEntry, revision: str, file: HubFile, target: Path) -> None:
        if target.is_file() and target.stat().st_size == file.size:
            return
        part = target.with_name(target.name + ".part")
        url = self._url(entry, revision, file.path)
        patience = Patience(url, self._retries, self._client.stop)
        mismatches = furthest = 0
        while True:
            begun = part.stat().st_size if part.exists() else 0
            self._guard.check(target.parent, max(file.size - begun, 0))
            try:
                if begun < file.size or file.size == 0:
                    self._fetch_rest(url, file, part, begun)
            except RefusalError as refusal:
                if refusal.status != 416:
                    raise self._refused(entry, refusal, file.path) from refusal
                part.unlink()  # the hub says that the file is shorter than what is there
                patience.endure(FaultError(str(refusal)))
                continue
            except FaultError as fault:
                # Beyond where it was before: a server that knows no ranges begins from the start each time.
                reached = part.stat().st_size if part.exists() else 0
                if reached > max(begun, furthest):
                    patience.progressed()
                furthest = max(begun, furthest, reached)
                patience.endure(fault)
                continue
            wrong = _what_is_wrong(part, file)
            if wrong is None:
                with part.open("rb+") as whole:
                    os.fsync(whole.fileno())  # from here on its size alone says that it is sound
                part.replace(target)
                return
            part.unlink()
            mismatches += 1
            if mismatches == _MISMATCHES:
                raise UserError(
                    f"{url} was fetched {mismatches} times, and {wrong}; is there a damaged mirror or proxy?"
                )

    def _fetch_rest(self, url: str, file: HubFile, part: Path, begun: int) -> None:
        headers = self._headers() | ({"Range": f"bytes={begun}-"} if begun else {})
        with self._client.opened(url, headers) as response:
            goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
            since_check = 0
            with part.open("ab" if goes_on else "wb") as out:
                for chunk in self._client.chunks(response):
                    out.write(chunk)
                    since_check += len(chunk)
                    if since_check >= _DISK_CHECK_BYTES:
                        self._guard.check(part.parent, _DISK_CHECK_BYTES)
                        since_check = 0
                    if out.tell() > file.size:
                        break  # the check of the hash will say so
        if part.stat().st_size < file.size:
            raise FaultError(f"the body broke off, {file.size - part.stat().st_size:,} bytes before its end")

    def _url(self, entry: CatalogueEntry, revision: str, path: str) -> str:
        from huggingface_hub import hf_hub_url  # noqa: PLC0415

        return hf_hub_url(entry.hub_id, path, repo_type="dataset", revision=revision, endpoint=self._endpoint)

    def _headers(self) -> dict[str, str]:
        return {} if self._token is None else {"Authorization": f"Bearer {self._token}"}

    def _ask(self, entry: CatalogueEntry, question: Callable[[], _Result]) -> _Result:
        """Asks the hub's interface, again after faults that may pass."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # noqa: PLC0415

        patience = Patience(f"{self._endpoint}/datasets/{entry.hub_id}", self._retries, self._client.stop)
        while True:
            try:
                return question()
            except OfflineModeIsEnabled as error:
                raise UserError(
                    f"{entry.hub_id} cannot be downloaded while HF_HUB_OFFLINE is set; unset it, or take files of your "
                    "own with --local"
                ) from error
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status < 500 and status not in (408, 429):
                    raise self._refused(entry, RefusalError(status, f"HTTP status {status}")) from error
                wait = seconds_to_wait(error.response.headers.get("Retry-After"))
                patience.endure(FaultError(f"HTTP status {status}", wait))
            except (HTTPError, OSError, json.JSONDecodeError) as error:
                patience.endure(FaultError(str(error)))

    def _refused(self, entry: CatalogueEntry, refusal: RefusalError, path: str = "") -> UserError:
        where = f"{self._endpoint}/datasets/{entry.hub_id}"
        what = f"{entry.hub_id} could not be read from the hub: {path or 'the repository'}"
        if refusal.status in (401, 403):
            return UserError(
                f"{what}: access is refused ({refusal}); accept its conditions at {where}, and run `hf auth login`"
                + ("" if self._token is None else " with a token that may read it")
            )
        if refusal.status == 404:
            return UserError(
                f"{what} is not there ({refusal}, {where}); if it is gated or private, run `hf auth login`; if the "
                "revision that the download began with is gone, remove the folder `raw/.tmp-NAME` and begin anew"
            )
        return UserError(f"{what}: {refusal}, {where}")


def _hub_file(item: Any) -> HubFile:
    return HubFile(item.path, item.size, item.blob_id, item.lfs.sha256 if item.lfs is not None else "")


def _what_is_wrong(part: Path, file: HubFile) -> str | None:
    """How a fetched file differs from what the hub states, or None."""
    size = part.stat().st_size if part.exists() else 0
    if size != file.size:
        return f"it has {size:,} bytes instead of {file.size:,}"
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with part.open("rb") as content:
        while chunk := content.read(2**20):
            digest.update(chunk)
    expected = file.sha256 or file.git_id
    if digest.hexdigest() != expected:
        return f"its {'SHA-256' if file.sha256 else 'Git id'} is {digest.hexdigest()} instead of {expected}"
    return None


# ---------------------------------------------------------------------------------------------------------------
# Which files a configuration has
# ---------------------------------------------------------------------------------------------------------------


def card_configs(card: str) -> dict[str, list[str]]:
    """The configurations that the head of a data set's card describes: name -> patterns of its training files.

    Raises:
        UserError: if the head is not YAML.
    """
    head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, flags=re.DOTALL)
    if head is None:
        return {}
    try:
        values = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        raise UserError(f"the data set's {_CARD} on the hub does not begin with valid YAML: {error}") from error
    found = values.get("configs") if isinstance(values, dict) else None
    configs = [config for config in found or [] if isinstance(config, dict) and "config_name" in config]
    patterns = {str(config["config_name"]): _patterns(config.get("data_files")) for config in configs}
    return {name: paths for name, paths in patterns.items() if paths}


def _patterns(data_files: Any) -> list[str]:
    """The patterns of the training files: all of them where no splits are told apart."""
    if isinstance(data_files, str):
        return [data_files]
    found: list[str] = []
    for item in data_files or []:
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict) and item.get("split", _SPLIT) == _SPLIT:
            paths = item.get("path")
            found += [paths] if isinstance(paths, str) else list(paths or [])
    return found


def choose_files(paths: Iterable[str], configs: dict[str, list[str]], config: str | None) -> list[str]:
    """The files of a configuration in the order of their rows.

    The card's patterns are taken where it has some for the configuration, otherwise the folder of that name.

    Args:
        paths: all files of the repository.
        configs: as `card_configs` gives them.
        config: the configuration; None for the only one, the one called `default`, or the whole repository.
    """
    readable = sorted(path for path in paths if path.lower().endswith(DATA_SUFFIXES))
    name = config
    if name is None:
        name = next(iter(configs)) if len(configs) == 1 else "default"
    if name in configs:
        chosen: dict[str, None] = {}
        for pattern in configs[name]:
            matcher = _matcher(pattern)
            chosen.update(dict.fromkeys(path for path in readable if matcher.fullmatch(path)))
        return list(chosen)
    return readable if config is None else [path for path in readable if path.startswith(f"{config}/")]


def _matcher(pattern: str) -> re.Pattern[str]:
    """A pattern as in a shell, in which `*` stays within a folder and `**` does not; a folder stands for its files."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./").rstrip("/"))
    translated = "".join(
        parts.get(piece) or (piece.replace("[!", "[^", 1) if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )
    return re.compile(translated + "(?:/.*)?")
