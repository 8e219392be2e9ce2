"""`doge-lm serve MODEL`: an HTTP server with OpenAI's API, and a chat page."""

import argparse
import asyncio
import gc
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import torch
import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging
from uvicorn.server import HANDLED_SIGNALS

from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from .decoding import position_limit, refuse_other_models, trained_length
from .flags import API_KEY_VARIABLE, DEFAULT_CONTEXT, DEFAULT_SLOTS
from .gate import Access
from .loading import load_model, pick_device
from .server import Running, Settings, create_app
from .service import Limits
from .slots import Slots, bytes_of_token

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 65
_LAST_SECONDS = 2  # after the answers have ended, for what is still to be sent


def run(args: argparse.Namespace) -> int:
    """Run `doge-lm serve` until it is told to stop."""
    _check(args)
    api_key = _api_key(args)
    device = pick_device(args.device)
    if device.type == "cpu":
        args.threads = args.threads or max(1, _cores() - 1)
        torch.set_num_threads(args.threads)
    with listening_socket(args.host, args.port) as listening:  # before the model is loaded, which takes long
        slots, tokenizer = _load(args, device)
        settings = Settings(
            model_id=_model_id(args),
            limits=Limits(slots.columns, min(args.max_tokens_limit or slots.columns, slots.columns)),
            access=Access(
                api_key, frozenset(map(str.lower, args.allow_host)), frozenset(args.allow_origin), args.max_body_bytes
            ),
            max_queue=args.max_queue,
            threads=args.threads,
        )
        running = Running()
        app = create_app(slots, tokenizer, settings, running)
        gc.freeze()  # a body of many lists has Python look through what it holds, where PyTorch's modules are the most
        server = Server(app, running, args.drain_seconds, lambda: _announce(listening, settings, slots))
        _leave_signals_to_it()
        server.run([listening])
    if running.engine is not None and running.engine.failure is not None:
        raise running.engine.failure
    return 0


def _load(args: argparse.Namespace, device: torch.device) -> tuple[Slots, PreTrainedTokenizerFast]:
    """The model in its slots, and its tokenizer."""
    logging.disable_progress_bar()
    dtype = "float32" if args.dtype == "auto" and device.type == "cpu" else args.dtype
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, device, dtype)
    context = _context(args, model, tokenizer)
    try:
        refuse_other_models(model)
        count = _slot_count(args, model, context)
        slots = Slots(model, count, context)
    except ValueError as error:
        raise UserError(f"the model in {args.model} cannot be served: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{count} texts of {context} tokens do not fit beside the model on {device}; lower --max_slots "
            "or --max_context"
        ) from error
    if len(tokenizer) > slots.vocabulary:
        raise UserError(
            f"the tokenizer in {args.model} has {len(tokenizer)} ids and the model {slots.vocabulary}; put the model's "
            "own tokenizer there"
        )
    return slots, tokenizer


class Server(uvicorn.Server):
    """uvicorn that, told to stop, first lets what is under way end, and refuses what is new.

    Args:
        app: the application.
        running: what it filled in.
        drain_seconds: how long answers may go on; then they end with an error.
        on_started: is called when requests are taken.
    """

    def __init__(
        self, app: object, running: Running, drain_seconds: float, on_started: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]  # an ASGI application, by other names of the same types
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        super().__init__(config)
        self._running, self._drain_seconds, self._on_started = running, drain_seconds, on_started
        self._deadline = math.inf  # by time.monotonic(), as the next
        self._last_deadline = math.inf
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first one drains, the second ends what is under way, another one its connections too."""
        self._signals += 1
        now = time.monotonic()
        if self._signals == 1:
            self._deadline = now + self._drain_seconds
        elif self._signals == 2:
            self._deadline = now
        else:
            self._last_deadline = now

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; called every tenth of a second."""
        engine = self._running.engine
        if engine is not None and engine.failure is not None:
            return True
        if self._signals:
            await self._drain()
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        """Bring the server a step nearer to its end."""
        state, engine = self._running.state, self._running.engine
        if not state.draining:
            state.drain.set()
            if state.requests:  # not said by the signal's handler, which may interrupt another line
                print(f"requests under way: {state.requests}; another signal ends them", file=sys.stderr)
        if engine is not None and self._last_deadline == math.inf and time.monotonic() >= self._deadline:
            await asyncio.to_thread(engine.stop)  # tells those who still wait
            self._last_deadline = min(self._last_deadline, time.monotonic() + _LAST_SECONDS)
        if time.monotonic() >= self._last_deadline:
            # Of those who do not read. uvicorn would cancel their requests, and log each as a failure.
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            self.should_exit = True
        self.should_exit |= state.requests == 0


def _leave_signals_to_it() -> None:
    """Ignore signals but while the server takes them: after its end they would only break into that of the process."""
    if threading.current_thread() is threading.main_thread():
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _check(args: argparse.Namespace) -> None:
    least = {"max_slots": 1, "max_queue": 0, "max_context": 2, "max_tokens_limit": 1, "max_body_bytes": 1, "threads": 1}
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name} is {value}; it must be at least {lowest}")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}; it must be 0 to 65535")
    if not 0 <= args.drain_seconds < float("inf"):
        raise UserError(f"--drain_seconds is {args.drain_seconds}; it must be at least 0")
    _model_id(args)
    args.allow_origin = [_as_sent(origin) for origin in args.allow_origin]


def _as_sent(origin: str) -> str:
    """An origin as browsers write it: small letters, and no port where it is the scheme's own."""
    scheme, separator, host = origin.lower().partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme)
    if default is None or not separator or not urlsplit(origin).netloc or urlsplit(origin.lower()).netloc != host:
        raise UserError(f"--allow_origin {origin}: give a scheme and a host, e.g. https://chat.example.org")
    return f"{scheme}://{host.removesuffix(default)}"


def _model_id(args: argparse.Namespace) -> str:
    name = args.model.resolve().name if args.model_name is None else args.model_name
    if not name or not name.isprintable():  # bytes that are no UTF-8 arrive as lone surrogates
        raise UserError(f"the model's name {name!a} is empty or cannot be written; give another --model_name")
    return name


def _api_key(args: argparse.Namespace) -> str | None:
    key, source = args.api_key, "--api_key"
    if key is None:
        key, source = os.environ.get(API_KEY_VARIABLE), f"the environment variable {API_KEY_VARIABLE}"
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError(f"{source} is empty, or holds spaces or characters beyond ASCII; give another key, or none")
    return key


def _context(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    positions = position_limit(model)
    if args.max_context is None:
        return int(min(trained_length(model, tokenizer), DEFAULT_CONTEXT))
    if args.max_context > positions:
        raise UserError(f"--max_context is {args.max_context}; the model in {args.model} has {positions} positions")
    return args.max_context


def _slot_count(args: argparse.Namespace, model: PreTrainedModel, context: int) -> int:
    """How many texts there is room for; memory for all of them is taken at the start."""
    of_slot = bytes_of_token(model) * context
    is_cuda = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if is_cuda else psutil.virtual_memory().available
    count = args.max_slots or max(1, min(DEFAULT_SLOTS, free // 2 // of_slot))
    if count * of_slot > free:
        raise UserError(
            f"{count} texts of {context} tokens take {count * of_slot / 2**30:.1f} GiB, and {free / 2**30:.1f} are "
            "free; lower --max_slots or --max_context"
        )
    return count


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; who connects before the server is ready waits.

    It names its protocol, by which asyncio knows that it may send small packets at once (TCP_NODELAY).

    Raises:
        UserError: for an address that is not this machine's, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host} is no address of this machine ({error}); try 127.0.0.1") from error
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)  # two that are only bound could share a port until one listens
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot listen at {host} port {port} ({error.strerror}); choose another --host or --port, or end what "
            "uses it"
        ) from error
    return listening


def _announce(listening: socket.socket, settings: Settings, slots: Slots) -> None:
    host, port = listening.getsockname()[:2]
    is_everywhere = host in ("0.0.0.0", "::")
    shown = socket.gethostname() if is_everywhere else f"[{host}]" if ":" in host else host
    print(f"chat page  http://{shown}:{port}/", f"API        http://{shown}:{port}/v1", sep="\n")
    if is_everywhere:
        print(f"listens    at all addresses of this machine, where others do not know the name {shown}")
    exact = "equal to" if slots.texts_are_independent else "up to rounding"
    print(
        f"model      {settings.model_id}, {slots.count} answers at once of {slots.columns} tokens with their prompts, "
        f"{exact} what each would be alone"
    )
    if settings.access.api_key is None and not host.startswith("127.") and host != "::1":
        print(
            f"warning: whoever reaches {shown} may use this server; --api_key or {API_KEY_VARIABLE} asks for a key",
            file=sys.stderr,
        )
    sys.stdout.flush()
