"""HTTP that does not give up at the first fault: retries with back-off, a rate limit, and a watch on the disk.

A fault that may pass (a reset, a timeout, a body that breaks off or dries up, 408, 429, 5xx) is a `FaultError`;
`Patience` waits and counts, says so where it takes long, and ends with a `UserError` that names the address. An answer
that will stay the same (401, 403, 404, ...) is a `RefusalError`; what it means is for the caller to say.
"""

import random
import shutil
import sys
import threading
import time
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path

import urllib3
from tqdm import tqdm
from urllib3.exceptions import HTTPError, MaxRetryError

from doge_lm.errors import UserError

# The waits of so many add up to two to four minutes: a router that is started anew does not end the run of a night.
DEFAULT_RETRIES = 10

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
_LONGEST_RETRY_AFTER_SECONDS = 3600.0
_CONNECT_SECONDS = 30.0
# A wait as long as this is worth a line; where many transfers wait for one server, one line in this time is enough.
NOTICE_SECONDS = 10.0
# A body that brings less than this many bytes in this time counts as broken.
STALL_SECONDS = 60.0
_STALL_BYTES = 1024

_CHUNK_BYTES = 2**18
_PASSING_STATUS = {408, 425, 429}


class FaultError(Exception):
    """What may pass: the same request may succeed later.

    Args:
        reason: what happened.
        wait: seconds that the server asked for, or None.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class RefusalError(Exception):
    """An answer that will stay the same; `status` is the HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class StoppedError(Exception):
    """The transfer was given up because another one failed, or the user interrupted the program."""


class RateLimit:
    """At most so many bytes a second, over all threads that share it; None is no limit."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def debt(self, size: int) -> float:
        """Books some bytes, and says how many seconds to wait for them."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + size / self._rate
            return self._free_at - now


class DiskGuard:
    """Stops before less than some bytes are free.

    Args:
        least_free: bytes to leave free.
    """

    def __init__(self, least_free: int) -> None:
        self._least_free = least_free

    def check(self, folder: Path, upcoming: int) -> None:
        """Checks that there is room for some more bytes in a folder.

        Raises:
            UserError: if less than `least_free` would be left.
        """
        free = shutil.disk_usage(folder).free
        if free - upcoming < self._least_free:
            raise UserError(
                f"{folder}: {free / 10**9:,.2f} GB are free, {upcoming / 10**9:,.2f} GB are to come, and "
                f"--min_free_disk wants {self._least_free / 10**9:,.2f} GB left; what is done so far is kept: free "
                "some space and run the same command again, or lower --min_free_disk"
            )


class _Notices:
    """Says on stderr what is waited for, at most a line in `NOTICE_SECONDS` from each process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_at = 0.0

    def say(self, line: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next_at:
                return
            self._next_at = now + NOTICE_SECONDS
        tqdm.write(line, file=sys.stderr)  # does not tear the progress bar


_notices = _Notices()


class Patience:
    """Waits after a fault, longer each time, and gives up after so many faults in a row.

    Args:
        url: what is fetched, for the message.
        retries: how often it may be tried again.
        stop: ends the waiting.
    """

    def __init__(self, url: str, retries: int, stop: threading.Event) -> None:
        self._url = url
        self._retries = retries
        self._stop = stop
        self._faults = 0

    def progressed(self) -> None:
        """Something new arrived: faults are counted from here."""
        self._faults = 0

    def endure(self, fault: FaultError) -> None:
        """Waits after a fault.

        Raises:
            UserError: if it was the last one to be borne.
            StoppedError: if the transfers are being given up.
        """
        self._faults += 1
        if self._faults > self._retries:
            tries = "1 try" if self._faults == 1 else f"{self._faults} tries"
            raise UserError(
                f"{self._url} could not be fetched in {tries}: {fault}; what is done so far is kept: run the same "
                "command again later, or with more --retries"
            ) from fault
        wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** (self._faults - 1))
        wait *= random.uniform(0.5, 1.0)  # so that many transfers do not come back at the same moment
        if fault.wait is not None:
            wait = max(wait, fault.wait)
        if wait >= NOTICE_SECONDS:
            _notices.say(f"{self._url}: {fault}; waiting {wait:,.0f} seconds before the next try")
        if self._stop.wait(wait):
            raise StoppedError


class Client:
    """Kept-alive connections to any number of hosts, for many threads; the environment's proxies are used.

    Args:
        connections: kept for each host; as many threads may be at work.
        rate: the limit on what all bodies bring.
        stop: set it to end all transfers.
    """

    def __init__(self, connections: int, rate: RateLimit, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self._rate = rate
        self._connections = connections
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> urllib3.BaseHTTPResponse:
        """Sends a GET and follows redirections; the body is not read yet. Who opens must `close` the response.

        `Authorization` is not passed on to another host.

        Raises:
            FaultError: if no connection came about, or the status is one that may pass.
            RefusalError: if the status says that it will stay so.
        """
        if self.stop.is_set():
            raise StoppedError
        try:
            response = self._pool(url).request(
                "GET",
                url,
                headers={"User-Agent": "doge-lm", "Accept-Encoding": "identity", **(headers or {})},
                preload_content=False,
                decode_content=False,
                retries=urllib3.Retry(total=8, connect=0, read=0, status=0, other=0, raise_on_status=False),
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=STALL_SECONDS),
            )
        except (HTTPError, OSError) as error:
            cause = error.reason if isinstance(error, MaxRetryError) and error.reason is not None else error
            raise FaultError(str(cause)) from error
        if response.status < 300:
            return response
        retry_after = response.headers.get("Retry-After")
        reason = f"HTTP status {response.status} {response.reason or ''}".rstrip()
        response.drain_conn()  # so that the connection can be used again
        if response.status in _PASSING_STATUS or response.status >= 500:
            raise FaultError(reason, seconds_to_wait(retry_after))
        raise RefusalError(response.status, reason)

    @contextmanager
    def opened(
        self, url: str, headers: Mapping[str, str] | None = None
    ) -> Generator[urllib3.BaseHTTPResponse, None, None]:
        """As `open`; the connection is kept for the next request, or closed if the block ends with an exception."""
        response = self.open(url, headers)
        try:
            yield response
        except BaseException:
            response.close()
            raise
        response.release_conn()

    def chunks(self, response: urllib3.BaseHTTPResponse) -> Generator[bytes, None, None]:
        """The body in pieces, as they arrive, no faster than the rate limit allows.

        Raises:
            FaultError: if the body breaks off or dries up.
            StoppedError: if the transfers are being given up.
        """
        since, arrived = time.monotonic(), 0
        try:
            while chunk := response.read1(_CHUNK_BYTES):
                yield chunk
                arrived += len(chunk)
                debt = self._rate.debt(len(chunk))
                if self.stop.wait(debt) if debt > 0 else self.stop.is_set():
                    raise StoppedError
                now = time.monotonic()
                if debt > 0 or arrived >= _STALL_BYTES:
                    since, arrived = now, 0  # slow by our own will is no stall
                elif now - since > STALL_SECONDS:
                    raise FaultError(f"only {arrived} bytes came in {now - since:.0f} seconds")
        except (HTTPError, OSError) as error:
            raise FaultError(f"the body broke off: {error}") from error
        remaining = getattr(response, "length_remaining", None)
        if remaining:
            raise FaultError(f"the body broke off, {remaining:,} bytes before its end")

    def get(self, url: str, retries: int, headers: Mapping[str, str] | None = None) -> bytes:
        """A small body, whole, tried again at a fault.

        Raises:
            UserError: if it cannot be fetched.
            RefusalError: as `open`.
        """
        patience = Patience(url, retries, self.stop)
        while True:
            try:
                return self.get_once(url, headers)
            except FaultError as fault:
                patience.endure(fault)

    def get_once(self, url: str, headers: Mapping[str, str] | None = None) -> bytes:
        """A small body, whole, tried once.

        Raises:
            FaultError: if it cannot be fetched now.
            RefusalError: as `open`.
        """
        with self.opened(url, headers) as response:
            return b"".join(self.chunks(response))

    def _pool(self, url: str) -> urllib3.PoolManager:
        scheme, host = urllib3.util.parse_url(url).scheme or "http", urllib3.util.parse_url(url).host or ""
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = (
                    urllib3.PoolManager(maxsize=self._connections)
                    if proxy is None
                    else urllib3.ProxyManager(proxy, maxsize=self._connections)
                )
            return self._pools[proxy]


def seconds_to_wait(retry_after: str | None) -> float | None:
    """What a `Retry-After` header asks for (seconds, or a date), at most an hour; None if it asks for nothing."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_SECONDS)
