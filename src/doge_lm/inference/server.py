"""The HTTP application: OpenAI's endpoints, the chat page, health and metrics."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from .. import __version__
from .answers import Answers, ChatFormat, CompletionFormat, Format
from .api import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Generation,
    ModelCard,
    ModelList,
)
from .bodies import body_of, described_body, schemas
from .engine import Engine
from .gate import Access, Gate, RefusalError, State, send_refusal
from .metrics import CONTENT_TYPE, Metrics
from .service import Limits, Service
from .slots import Slots
from .spelling import Spelling

_Result = TypeVar("_Result")

PAGE = {
    "/": ("index.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Args:
        model_id: the model's name.
        limits: of length.
        access: who may ask for what.
        max_queue: answers that may wait for a slot.
        threads: of PyTorch, on a CPU; None leaves them as they are.
    """

    model_id: str
    limits: Limits
    access: Access = field(default_factory=Access)
    max_queue: int = 256
    threads: int | None = None


@dataclass
class Running:
    """What there is while the application runs."""

    state: State = field(default_factory=State)
    engine: Engine | None = None
    service: Service | None = None
    metrics: Metrics | None = None


def create_app(
    slots: Slots, tokenizer: PreTrainedTokenizerFast, settings: Settings, running: Running | None = None
) -> ASGIApp:
    """The application of one model; its engine runs between start-up and shutdown.

    Args:
        slots: the model.
        tokenizer: the model's, which is the application's own from here on.
        settings: how to serve.
        running: is filled in at start-up, for who runs the server.
    """
    running = running or Running()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        spelling = Spelling(tokenizer)
        post = asyncio.get_running_loop().call_soon_threadsafe
        engine = Engine(
            slots,
            spelling,
            tokenizer.eos_token_id,
            max_waiting=settings.max_queue,
            threads=settings.threads,
            post=lambda run: void(post(run)),
        )
        running.engine, running.metrics = engine, Metrics(engine.load)
        running.state.finished = running.metrics.finished
        running.service = Service(engine, tokenizer, spelling, settings.model_id, settings.limits)
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)
            running.service.close()

    app = FastAPI(
        title="doge-lm serve",
        version=__version__,
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    _add_error_handlers(app)
    _add_api(app, running, settings)
    _add_page(app)
    app.openapi()["components"]["schemas"].update(schemas(CompletionRequest, ChatRequest))
    return Gate(app, settings.access, running.state)


def void(_: object) -> None:
    """Forget a result."""


def _add_api(app: FastAPI, running: Running, settings: Settings) -> None:
    created = int(time.time())
    limits = settings.limits
    card = ModelCard(
        id=settings.model_id,
        created=created,
        max_model_len=limits.context,
        max_output_tokens=limits.max_tokens,
    )

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are taken: 200, or 503 while the server shuts down."""
        assert running.engine is not None
        if running.engine.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "draining"}, 503) if running.state.draining else JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        assert running.metrics is not None
        return Response(running.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The models: one."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> ModelCard:
        """The model by its id."""
        if model_id != card.id:
            raise RefusalError(404, f"there is no model {model_id[:100]!r} here", param="model", code="model_not_found")
        return card

    stream = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={200: {"content": stream}},
        openapi_extra=described_body(CompletionRequest),
    )
    async def completions(
        body: Annotated[CompletionRequest, Depends(body_of(CompletionRequest))], request: Request
    ) -> Response:
        """Continue a text, or several. With `stream`, events hold the same object with a part of an answer."""
        assert running.service is not None
        begun = running.service.complete(body)
        return await _respond(begun, CompletionFormat, body, request, running)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": stream}},
        openapi_extra=described_body(ChatRequest),
    )
    async def chat_completions(
        body: Annotated[ChatRequest, Depends(body_of(ChatRequest))], request: Request
    ) -> Response:
        """Answer a conversation. With `stream`, events hold objects `chat.completion.chunk`."""
        assert running.service is not None
        begun = running.service.chat(body)
        return await _respond(begun, ChatFormat, body, request, running)


def _add_page(app: FastAPI) -> None:
    folder = resources.files("doge_lm.inference") / "page"
    for path, (name, kind) in PAGE.items():
        content = (folder / name).read_bytes()
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(_static(content, kind))


def _static(content: bytes, kind: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def serve() -> Response:
        return Response(content, media_type=kind)

    return serve


# ---------------------------------------------------------------------------------------------------------- answers


async def _respond(
    begun: Awaitable[Answers], kind: type[Format], body: Generation, request: Request, running: Running
) -> Response:
    """Answer a request, as a stream or whole; if the client leaves, its answers are cancelled."""
    service, metrics = running.service, running.metrics
    assert service is not None
    assert metrics is not None
    start = time.monotonic()
    answers = await begun
    answer = kind(answers, service.spelling)

    def end() -> None:
        answers.cancel()
        metrics.request_seconds.observe(time.monotonic() - start)
        if answers.first_at is not None:
            metrics.first_token_seconds.observe(answers.first_at - start)

    if body.stream:
        options = body.stream_options
        events = answer.events(include_usage=bool(options and options.include_usage))
        return _EventStream(events, end)
    try:
        parts = await _unless_disconnected(answers.whole(), request.receive)
    finally:
        end()
    if parts is None:
        return Response(status_code=499)  # nobody reads it
    return Response(json.dumps(answer.body(parts), ensure_ascii=False).encode(), media_type="application/json")


class _EventStream(Response):
    """Server-sent events, until they end or the client leaves."""

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        # A proxy (nginx) is to pass events on as they come.
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _unless_disconnected(self._send_all(send), receive)
        finally:
            self._end()

    async def _send_all(self, send: Send) -> None:
        async for event in self._events:
            # A reader that is slow holds up this loop alone.
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_disconnected(work: Coroutine[Any, Any, _Result], receive: Receive) -> _Result | None:
    """The result of some work; None if the client has left before, and the work was cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ----------------------------------------------------------------------------------------------------------- errors


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RefusalError)
    async def refused(_: Request, error: RefusalError) -> Response:
        return _Refused(error)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"there is nothing at {request.url.path[:200]!r}",
            405: f"{request.url.path[:200]} does not take {request.method[:20]}",
        }.get(error.status_code, str(error.detail))
        return _Refused(RefusalError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _Refused(RefusalError(500, "the server failed; its log says how", kind="server_error"))


class _Refused(Response):
    def __init__(self, refusal: RefusalError) -> None:
        super().__init__(status_code=refusal.status)
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_refusal(self._refusal, scope["method"], send)
