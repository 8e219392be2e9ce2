"""Contents by blob id, and what every transfer does at faults."""

import threading
import time
from collections.abc import Callable

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


def test_what_a_server_asks_for() -> None:
    assert seconds_to_wait("7") == 7
    assert seconds_to_wait("-1") == 0
    assert seconds_to_wait("1e9") == 3600
    assert seconds_to_wait("soon") is None
    assert seconds_to_wait(None) is None
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 1000))
    assert 900 < (seconds_to_wait(later) or 0) <= 1000
