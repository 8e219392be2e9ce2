"""Contents by blob id, and what every transfer does at faults."""

import heapq
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from doge_lm.data import transfer
from doge_lm.data.contents import MISSING, NOT_TEXT, ContentFetcher
from doge_lm.data.transfer import Client, FaultError, Patience, RateLimit, StoppedError, seconds_to_wait
from doge_lm.errors import UserError
from tests.data.loopback import Fault, Log, bucket_handler, serve


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "FIRST_WAIT_SECONDS", 0.001)


def fetch(
    contents: dict[str, bytes], faults: dict[str, list[Fault]], ids: list[str], log: Log | None = None
) -> tuple[list[str], dict[str, int]]:
    with serve(bucket_handler(contents, faults, log)) as address:
        fetcher = ContentFetcher(address, 4, Client(4, RateLimit(None)), retries=3)
        return [row["text"] for row in fetcher.fill_in({"blob_id": id_} for id_ in ids)], fetcher.counts


def test_contents_come_in_order_through_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    contents = {f"b{n}": f"print({n})  # 中文\n".encode() for n in range(200)}
    contents["b7"] = b"\xff\xfe"
    del contents["b3"]
    faults = {
        "b0": [Fault(after=9, how="stall"), Fault(429, retry_after="0.01")],
        "b1": [Fault(500), Fault(503)],
        "b4": [Fault(after=9, how="cut"), Fault(after=5, how="reset"), Fault(how="alter")],
        "b9": [Fault(403)],
    }
    found, counts = fetch(contents, faults, [f"b{n}" for n in range(200)])
    assert found == [contents[f"b{n}"].decode() for n in range(200) if n not in (3, 7, 9)]
    assert counts == {MISSING: 2, NOT_TEXT: 1}
    assert not any(faults.values())


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([Fault(500)] * 4, r"content/b2 could not be fetched in 4 tries: HTTP status 500"),
        ([Fault(how="alter")] * 4, r"content/b2 could not be fetched in 4 tries: not a sound gzip file"),
        ([Fault(400)], r"content/b2 could not be fetched: HTTP status 400"),
    ],
)
def test_a_content_that_cannot_be_fetched(faults: list[Fault], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch({f"b{n}": b"x" for n in range(5)}, {"b2": faults}, [f"b{n}" for n in range(5)])


def test_a_bucket_that_closes_is_doubted() -> None:
    # The first contents are there; then there are none any more.
    log = Log()
    with pytest.raises(UserError, match="100 contents in a row are not at"):
        fetch({f"b{n}": b"x" for n in range(50)}, {}, [f"b{n}" for n in range(1000)], log)
    assert len(log.requests) < 200


def test_a_bucket_out_of_reach() -> None:
    fetcher = ContentFetcher("http://127.0.0.1:9", 2, Client(2, RateLimit(None)), retries=1)
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/content/b could not be fetched in 2 tries"):
        list(fetcher.fill_in([{"blob_id": "b"}]))


def test_the_rate_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.time, "monotonic", lambda: 100.0)
    limit = RateLimit(1000)
    # Whoever books waits behind all who did before.
    assert [limit.debt(500), limit.debt(1000), limit.debt(250)] == [0.5, 1.5, 1.75]
    assert RateLimit(None).debt(10**9) == 0.0


@pytest.mark.parametrize("transfers", [1, 7])
def test_all_bodies_together_keep_to_the_rate(monkeypatch: pytest.MonkeyPatch, transfers: int) -> None:
    """Bodies that could arrive at once, of several transfers, on a clock that only their waits move on."""
    rate, piece, pieces = 1000.0, 300, 40
    clock = [50.0]
    waited: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return False

    class Body:
        left = pieces

        def read1(self, size: int) -> bytes:
            self.left -= 1
            return b"x" * piece if self.left >= 0 else b""

    monkeypatch.setattr(transfer.time, "monotonic", lambda: clock[0])
    client = Client(transfers, RateLimit(rate), Stop())
    bodies: list[Iterator[bytes]] = [client.chunks(Body()) for _ in range(transfers)]  # type: ignore[arg-type]
    ready = [(clock[0], number) for number in range(transfers)]
    arrived: list[tuple[float, int]] = []
    # As threads would: who is ready first goes on until its next wait, at the end of which it has its next piece.
    while ready:
        clock[0], number = heapq.heappop(ready)
        waited.clear()
        chunk: Any = next(bodies[number], None)
        if chunk is not None:
            at = clock[0] + sum(waited)
            arrived.append((at, len(chunk)))
            heapq.heappush(ready, (at, number))
        else:
            clock[0] += sum(waited)
    total, seconds = transfers * pieces * piece, clock[0] - 50.0
    assert sum(size for _, size in arrived) == total
    # On the mean exactly the limit; at any moment no more ahead of it than the piece that each reads next.
    assert seconds == pytest.approx(total / rate)
    for moment, _ in arrived:
        so_far = sum(size for at, size in arrived if at <= moment)
        assert so_far <= rate * (moment - 50.0) + transfers * piece + 1e-6


def test_an_idle_time_is_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(transfer.time, "monotonic", lambda: clock[0])
    limit = RateLimit(1000)
    assert limit.debt(500) == 0.5
    clock[0] += 60
    assert limit.debt(2000) == 2.0


def waits_of(faults: int, stop: threading.Event, waits: list[float]) -> Callable[[], None]:
    class Recorder(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return stop.is_set()

    patience = Patience("URL", faults, Recorder())

    def endure() -> None:
        patience.endure(FaultError("reason"))

    return endure


def test_waits_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_WAIT_SECONDS", 1.0)
    waits: list[float] = []
    endure = waits_of(8, threading.Event(), waits)
    for _ in range(8):
        endure()
    for wait, whole in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60), strict=True):
        assert whole / 2 <= wait <= whole
    with pytest.raises(UserError, match="URL could not be fetched in 9 tries: reason"):
        endure()
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        waits_of(1, stop, [])()


def test_long_waits_are_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(transfer, "_notices", transfer._Notices())
    monkeypatch.setattr(transfer.time, "monotonic", lambda: clock[0])
    waits: list[float] = []
    stop = threading.Event()
    waits_of(9, stop, waits)()
    assert capsys.readouterr().err == ""
    for clock[0] in (100.0, 101.0):  # the second comes too soon after the first for another line
        patience = Patience("URL", 9, stop)
        stop.set()
        with pytest.raises(StoppedError):
            patience.endure(FaultError("HTTP status 429", wait=1800.0))
    assert capsys.readouterr().err == "URL: HTTP status 429; waiting 1,800 seconds before the next try\n"


def test_what_a_server_asks_for() -> None:
    assert seconds_to_wait("7") == 7
    assert seconds_to_wait("-1") == 0
    assert seconds_to_wait("1e9") == 3600
    assert seconds_to_wait("soon") is None
    assert seconds_to_wait("Wed, 99 Foo 9999 07:28:00 GMT") is None
    assert seconds_to_wait(None) is None
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 1000))
    assert 900 < (seconds_to_wait(later) or 0) <= 1000
