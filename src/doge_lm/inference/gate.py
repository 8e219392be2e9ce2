"""What every request passes before the application sees it: who asks, for what, and how much.

A server that listens on this machine can be reached by every page that a browser here has open. So a request that names
another host than this one (DNS rebinding) or another origin (a page of another site) is refused, unless allowed.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Container, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_SECONDS = 30.0
"""How long a client may take to send the body of a request."""

DISCARD_SECONDS = 5.0
DISCARD_BYTES = 64 << 20
"""How long, and how much, of a body that is refused is still read: some clients look for no answer before its end."""

DRAINING_DISCARD_SECONDS = 0.5
"""How long such a body is read while the server shuts down."""

PROTECTED = ("/v1/", "/metrics")
"""Paths that need the API key, where there is one."""

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class RefusalError(Exception):
    """A request that is not served.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        kind: OpenAI's `type` of the error.
        param: the field at fault.
        code: OpenAI's `code` of the error.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.kind, self.param, self.code = kind, param, code
        self.headers = headers or {}

    def body(self) -> bytes:
        """The error in OpenAI's form, in ASCII, whatever the message quotes."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


@dataclass(frozen=True)
class Access:
    """Who may ask for what.

    Args:
        api_key: what `Authorization: Bearer` must hold; None: nothing.
        hosts: names that the server is asked by, besides localhost, the machine's name, and addresses.
        origins: other sites whose pages may use the server, as `https://chat.example.org`.
        max_body_bytes: the largest request.
    """

    api_key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    max_body_bytes: int = 1 << 20


@dataclass
class State:
    """What the gate and who runs the server share."""

    drain: asyncio.Event = field(default_factory=asyncio.Event)  # set, in the event loop, to take no more requests
    requests: int = 0  # under way, from the first byte of the head to the last of the answer
    finished: Callable[[str, str, int], None] = field(default=lambda method, path, status: None)

    @property
    def draining(self) -> bool:
        """Whether the server shuts down."""
        return self.drain.is_set()


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, application: Application, access: Access, state: State) -> None:
        self._application, self._access, self._state = application, access, state
        self._own_names = {"localhost", socket.gethostname().lower(), *access.hosts}
        # Around the refusals too, which a page of an allowed origin could not read otherwise. What such a page may ask
        # for is checked with the request itself; so any preflight is allowed.
        self._for_origins = CORSMiddleware(
            self._check_and_pass,
            allow_origins=access.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["retry-after"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on with its whole body."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_encoded(SECURITY_HEADERS)]
            await send(message)

        is_allowed = _Headers(scope["headers"]).has_only("origin", self._access.origins)
        self._state.requests += 1
        try:
            await (self._for_origins if is_allowed else self._check_and_pass)(scope, receive, answer)
        finally:
            self._state.requests -= 1
            self._state.finished(scope["method"], scope["path"], status or 499)  # 499: the client had left

    async def _check_and_pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        upload = _Upload(receive, self._state.drain)
        try:
            self._check(scope)
            body = await self._body(scope, upload)
        except RefusalError as refusal:
            await self._refuse(refusal, scope, upload, send)
            return
        if body is not None:
            await self._application(scope, _replaying(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers = _Headers(scope["headers"])
        host, origin = headers.only("host"), headers.only("origin")
        self._check_host(host)
        self._check_origin(origin, host)
        if any(scope["path"].startswith(place) for place in PROTECTED):
            if origin is None and headers.only("sec-fetch-site") in ("cross-site", "same-site"):
                raise _other_origin("another site")
            self._check_key(headers.only("authorization"))
        if scope["method"] != "POST":
            return
        if self._state.draining:
            raise stopping()
        kind = (headers.only("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusalError(415, f"the content type is {kind[:100]!r}; send application/json")
        if headers.only("content-encoding") not in (None, "identity"):
            raise RefusalError(415, "the body is compressed; send it as it is")

    def _check_host(self, host: str | None) -> None:
        name = (urlsplit(f"//{host}").hostname or "") if host and _is_netloc(host) else ""
        if name not in self._own_names and not _is_address(name):
            raise RefusalError(
                403,
                f"this server does not answer to the host {(host or '')[:100]!r}; use its address, or start it with "
                "--allow_host",
                code="host_not_allowed",
            )

    def _check_origin(self, origin: str | None, host: str | None) -> None:
        if origin is None or origin in self._access.origins:
            return
        if not _is_netloc(origin.partition("://")[2]) or urlsplit(origin).netloc.lower() != (host or "").lower():
            raise _other_origin(repr(origin[:100]))

    def _check_key(self, authorization: str | None) -> None:
        key = self._access.api_key
        if key is None:
            return
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise RefusalError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, upload: "_Upload") -> bytes | None:
        """The whole body of a POST; None if the client has left. Other methods have none that is read."""
        if scope["method"] != "POST":
            return b""
        most = self._access.max_body_bytes
        too_large = RefusalError(
            413, f"the body has more than {most} bytes (--max_body_bytes)", code="request_too_large"
        )
        length = _Headers(scope["headers"]).only("content-length")
        if length is not None and length.isdecimal() and int(length[:20]) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await upload.next()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise RefusalError(408, f"the body took more than {BODY_SECONDS:.0f} seconds", headers=_CLOSE) from error

    async def _refuse(self, refusal: RefusalError, scope: Scope, upload: "_Upload", send: Send) -> None:
        """Answer, and read what is left of the body: a connection that is closed before loses the answer too."""
        await send(_head(refusal))
        await send({**_content(refusal, scope["method"]), "more_body": True})
        if scope["method"] == "POST" and not _Headers(scope["headers"]).has("expect"):
            with contextlib.suppress(TimeoutError, RefusalError):
                async with asyncio.timeout(DRAINING_DISCARD_SECONDS if self._state.draining else DISCARD_SECONDS):
                    await upload.discard(DISCARD_BYTES)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Upload:
    """The body of a request, as it comes.

    Args:
        receive: of the request.
        drain: is set when the server shuts down.
    """

    def __init__(self, receive: Receive, drain: asyncio.Event) -> None:
        self._receive, self._drain = receive, drain
        self._is_over = False

    async def next(self) -> Message:
        """The next message.

        Raises:
            RefusalError: if the server begins to shut down before it comes.
        """
        was_draining = self._drain.is_set()
        message = asyncio.ensure_future(self._receive())
        drain = asyncio.ensure_future(self._drain.wait())
        try:
            await asyncio.wait({message} if was_draining else {message, drain}, return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                raise stopping()
            self._is_over = not message.result().get("more_body", False)
            return message.result()
        finally:
            message.cancel()
            drain.cancel()

    async def discard(self, most: int) -> None:
        """Read on to the end, or beyond so many bytes.

        Raises:
            RefusalError: if the server begins to shut down before.
        """
        size = 0
        while not self._is_over and size < most:
            size += len((await self.next()).get("body", b""))


_CLOSE = {"connection": "close"}


class _Headers:
    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._headers = headers

    def only(self, name: str) -> str | None:
        """The value of a header that may be there once.

        Raises:
            RefusalError: if it is there more than once: which one counts would be a guess.
        """
        values = [value for key, value in self._headers if key.lower() == name.encode()]
        if len(values) > 1:
            raise RefusalError(400, f"the header {name} is there {len(values)} times; send it once")
        return values[0].decode("latin-1") if values else None

    def has_only(self, name: str, values: Container[str]) -> bool:
        """Whether a header is there once, with one of some values."""
        found = [value.decode("latin-1") for key, value in self._headers if key.lower() == name.encode()]
        return len(found) == 1 and found[0] in values

    def has(self, name: str) -> bool:
        """Whether a header is there."""
        return any(key.lower() == name.encode() for key, _ in self._headers)


def stopping() -> RefusalError:
    """What is said to those who come while the server shuts down."""
    return RefusalError(
        503,
        "the server is shutting down",
        kind="server_error",
        code="shutting_down",
        headers={"retry-after": "5", **_CLOSE},
    )


def _other_origin(whose: str) -> RefusalError:
    return RefusalError(
        403,
        f"pages of {whose} may not use this server; start it with --allow_origin to allow it",
        code="origin_not_allowed",
    )


async def send_refusal(refusal: RefusalError, method: str, send: Send) -> None:
    """Answer a request with an error."""
    await send(_head(refusal))
    await send(_content(refusal, method))


def _head(refusal: RefusalError) -> Message:
    length = str(len(refusal.body()))
    headers = {"content-type": "application/json", "content-length": length, **refusal.headers}
    return {"type": "http.response.start", "status": refusal.status, "headers": _encoded(headers)}


def _content(refusal: RefusalError, method: str) -> Message:
    return {"type": "http.response.body", "body": b"" if method == "HEAD" else refusal.body()}


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, and then what comes: that the client has left."""
    left = [body]

    async def replay() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replay


def _is_netloc(text: str) -> bool:
    """Whether a text is a host and perhaps a port, and nothing else that `urlsplit` would find in it or fail at."""
    try:
        parts = urlsplit(f"//{text}")
        _ = parts.port  # a port that is no number fails here
    except ValueError:
        return False
    return bool(parts.hostname) and parts.netloc == text and parts.username is None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
