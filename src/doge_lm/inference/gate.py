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
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_SECONDS = 30.0
"""How long a client may take to send the body of a request."""

DISCARD_SECONDS = 5.0
DISCARD_BYTES = 64 << 20
"""How long, and how much, of a body that is refused is read before the answer."""

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

    draining: bool = False
    requests: int = 0  # under way, from the first byte of the head to the last of the answer
    finished: Callable[[str, str, int], None] = field(default=lambda method, path, status: None)


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, application: Application, access: Access, state: State) -> None:
        self._application, self._access, self._state = application, access, state
        self._own_names = {"localhost", socket.gethostname().lower(), *access.hosts}

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

        self._state.requests += 1
        try:
            try:
                self._check(scope)
                body = await self._body(scope, receive)
            except RefusalError as refusal:
                await self._discard(scope, receive)
                await send_refusal(refusal, answer, head_only=scope["method"] == "HEAD")
                return
            if body is not None:
                await self._application(scope, _replaying(body, receive), answer)
        finally:
            self._state.requests -= 1
            self._state.finished(scope["method"], scope["path"], status or 499)  # 499: the client had left

    def _check(self, scope: Scope) -> None:
        headers = _Headers(scope["headers"])
        host, origin = headers.only("host"), headers.only("origin")
        self._check_host(host)
        self._check_origin(origin, host)
        path = scope["path"]
        # A browser asks without the key whether it may ask with it.
        if any(path.startswith(place) for place in PROTECTED) and scope["method"] != "OPTIONS":
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
            raise RefusalError(
                403,
                f"pages of {origin[:100]!r} may not use this server; start it with --allow_origin to allow it",
                code="origin_not_allowed",
            )

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

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
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
                    message = await receive()
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

    async def _discard(self, scope: Scope, receive: Receive) -> None:
        """Read what is left of a body that is refused: most clients see no answer before they have sent all of it."""
        if scope["method"] != "POST" or _Headers(scope["headers"]).has("expect"):
            return
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while size < DISCARD_BYTES:
                    message = await receive()
                    if not message.get("more_body", False):
                        return
                    size += len(message.get("body", b""))


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


async def send_refusal(refusal: RefusalError, send: Send, *, head_only: bool = False) -> None:
    """Answer a request with an error."""
    body = refusal.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    await send({"type": "http.response.start", "status": refusal.status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": b"" if head_only else body})


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
