"""Malformed requests from the server's own description: each is refused, by a status of 4xx, and none hangs.

DOGE_TEST_ALL=1 sends 10,000 instead of 400.
"""

from __future__ import annotations

import http.client
import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from doge_lm.inference.api import ChatRequest, CompletionRequest
from tests.inference.fuzzing import Description, Malformed
from tests.inference.serving import Serving, serving
from tests.small_model import make_model

MODELS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
COUNT = 10_000 if os.environ.get("DOGE_TEST_ALL") else 400


def send(connection: http.client.HTTPConnection, request: Malformed) -> tuple[int, bytes]:
    """The status and the body of the answer, on a connection that is kept while the server keeps it."""
    connection.putrequest(request.method, request.path, skip_host="host" in request.headers)
    for name, value in request.headers.items():
        connection.putheader(name, value)
    if request.method == "POST":
        connection.putheader("content-length", str(len(request.body)))
    connection.endheaders(request.body if request.method == "POST" else None)
    response = connection.getresponse()
    body = response.read()
    if response.will_close:
        connection.close()
    return response.status, body


def test_malformed_requests_are_refused(tmp_path: Path) -> None:
    with serving(make_model(tmp_path / "small")) as server:
        description = Description(server.ask("GET", "/openapi.json").json, server.model)
        assert len(description.bodies) == 2
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        faults: Counter[tuple[str, int]] = Counter()
        for request in islice(description.malformed(seed=0), COUNT):
            status, body = send(connection, request)
            assert 400 <= status < 500, (status, body, request)
            assert json.loads(body)["error"]["message"], request
            faults[request.fault, status] += 1
            check_stops_early(request)
        print(faults)
        assert {400, 403, 404, 405, 415} <= {status for _, status in faults}
        check_still_serves(server)


def check_stops_early(request: Malformed) -> None:
    """However many faults a body has, few of them are looked for: each takes time and memory."""
    if request.path in MODELS and request.fault not in ("text", "method"):
        assert error_count(request) < 12, request


def error_count(request: Malformed) -> int:
    """Faults that are found in a body before it is refused."""
    try:
        MODELS[request.path].model_validate(json.loads(request.body))
    except ValidationError as error:
        return error.error_count()
    return 0


def check_still_serves(server: Serving) -> None:
    assert server.complete(max_tokens=3).json["usage"]["completion_tokens"] == 3
    server.wait_until_answered()
    server.wait_until_idle()
