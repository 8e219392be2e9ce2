"""The texts of python-edu: gzip files in the Software Heritage bucket, named by blob id, fetched many at a time."""

import gzip
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from doge_lm.data.transfer import Client, FaultError, Patience, RefusalError
from doge_lm.errors import UserError

CONTENTS_VARIABLE = "DOGE_CONTENTS_ENDPOINT"
CONTENTS_ENDPOINT = "https://softwareheritage.s3.amazonaws.com"

MISSING = "contents missing in the bucket, skipped"
NOT_TEXT = "contents not UTF-8, skipped"

# A bucket that may not be listed answers 403 for a missing object; a bucket closed to us answers it for every one.
_MISSING_BEFORE_DOUBT = 100
# Contents fetched ahead of the one that is written next, for each thread.
_LOOK_AHEAD = 4


@dataclass
class ContentFetcher:
    """Fetches texts by blob id: `endpoint/content/BLOB_ID`.

    Attributes:
        endpoint: the bucket's address.
        threads: contents in flight.
        client: what fetches.
        retries: how often a content is tried again.
        counts: what was skipped, with the reason.
    """

    endpoint: str
    threads: int
    client: Client
    retries: int
    counts: dict[str, int] = field(default_factory=lambda: {MISSING: 0, NOT_TEXT: 0})

    def fill_in(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Adds `text` to rows that hold a `blob_id`, in order; rows without a readable content are left out.

        Raises:
            UserError: if a content cannot be fetched after some tries, or a hundred in a row are not there.
        """
        pending: deque[tuple[dict[str, Any], Future[str | None]]] = deque()
        source = iter(rows)
        in_a_row = 0
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                while True:
                    while len(pending) < _LOOK_AHEAD * self.threads and (row := next(source, None)) is not None:
                        pending.append((row, pool.submit(self._fetch, row["blob_id"])))
                    if not pending:
                        return
                    missing = self.counts[MISSING]
                    filled = self._filled(*pending.popleft())
                    in_a_row = in_a_row + 1 if self.counts[MISSING] > missing else 0
                    if in_a_row >= _MISSING_BEFORE_DOUBT:
                        raise UserError(
                            f"{_MISSING_BEFORE_DOUBT} contents in a row are not at {self.endpoint}/content/; is it "
                            "reachable, and the right --contents_endpoint?"
                        )
                    if filled is not None:
                        yield filled
            except BaseException:
                self.client.stop.set()  # nobody waits for the others
                raise
            finally:
                for _, future in pending:
                    future.cancel()

    def _filled(self, row: dict[str, Any], future: "Future[str | None]") -> dict[str, Any] | None:
        try:
            text = future.result()
        except UnicodeDecodeError:
            self.counts[NOT_TEXT] += 1
            return None
        if text is None:
            self.counts[MISSING] += 1
            return None
        return {**row, "text": text}

    def _fetch(self, blob_id: str) -> str | None:
        """One content, or None if the bucket does not have it."""
        url = f"{self.endpoint.rstrip('/')}/content/{blob_id}"
        patience = Patience(url, self.retries, self.client.stop)
        while True:
            try:
                return gzip.decompress(self.client.get_once(url)).decode("utf-8")
            except RefusalError as refusal:
                if refusal.status not in (403, 404):
                    raise UserError(f"{url} could not be fetched: {refusal}") from refusal
                return None
            except FaultError as fault:
                patience.endure(fault)
            except (OSError, EOFError, zlib.error) as error:  # a body that was damaged on its way
                patience.endure(FaultError(f"not a sound gzip file: {error}"))
