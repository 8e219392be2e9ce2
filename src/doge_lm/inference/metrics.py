"""What a server counts, in Prometheus' text format."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .engine import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

PATHS = frozenset(
    {"/", "/chat.css", "/chat.js", "/icon.svg", "/health", "/metrics", "/openapi.json"}
    | {"/v1/models", "/v1/completions", "/v1/chat/completions"}
)
"""Other paths are counted together: their number is the clients' choice."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server; of no process-wide registry, so that several servers do not mix.

    Args:
        load: asks the engine.
    """

    def __init__(self, load: Callable[[], Load]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_LoadCollector(load))
        self._requests = Counter(
            "doge_lm_requests", "Requests answered.", ("method", "path", "status"), registry=self._registry
        )
        self.first_token_seconds = Histogram(
            "doge_lm_first_token_seconds",
            "From a request to the first piece of its answer.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.request_seconds = Histogram(
            "doge_lm_request_seconds",
            "From a request to the end of its answer.",
            registry=self._registry,
            buckets=_SECONDS,
        )

    def finished(self, method: str, path: str, status: int) -> None:
        """Count a request that has been answered; status 499 is that of a client that left before."""
        known = method if method in ("GET", "POST", "OPTIONS", "HEAD") else "other"
        self._requests.labels(known, path if path in PATHS else "other", str(status)).inc()

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        """Ask the engine when somebody asks us."""
        load = self._load()
        yield GaugeMetricFamily("doge_lm_running", "Answers that are being written.", load.running)
        yield GaugeMetricFamily("doge_lm_waiting", "Answers that wait for a slot.", load.waiting)
        yield CounterMetricFamily("doge_lm_prompt_tokens", "Tokens of prompts that were read.", load.tokens_read)
        yield CounterMetricFamily("doge_lm_written_tokens", "Tokens that were written.", load.tokens_written)
