"""`doge-lm chat MODEL`: talk with a model in the terminal, or answer questions from a pipe.

Answers go to standard output, all else that is said to standard error.
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.tokenizer import refuse_surrogates
from ..errors import UserError
from .chat_input import Message, PipeLines, TerminalLines, edit_lines, read_message
from .chat_session import COMMANDS, Session, complete
from .chat_words import RefusedError, Words, pick_language
from .conversation import Answerer, Conversation
from .flags import MAX_NEW_TOKENS
from .loading import load_model, load_model_tokenizer, pick_device
from .settings import generation_settings


def run(args: argparse.Namespace) -> int:
    """Run `doge-lm chat`."""
    _speak_utf8()
    words = Words(pick_language(args.language))
    is_default_length = args.max_new_tokens is None
    if is_default_length:
        args.max_new_tokens = MAX_NEW_TOKENS
    settings = generation_settings(args)
    _check_texts(args)
    device = pick_device(args.device)
    logging.disable_progress_bar()  # the output is the conversation
    model = load_model(args.model, device, args.dtype)
    answerer = Answerer(
        model,
        load_model_tokenizer(args.model, model),
        args.model,
        compiled=args.compile,
        context_length=args.context_length,
    )
    if is_default_length:
        settings = replace(settings, max_new_tokens=int(max(1, min(MAX_NEW_TOKENS, answerer.limit / 2))))
    with _as_user_errors(words):
        answerer.template.check_system(args.system)
        session = Session(answerer, settings, words, Conversation(args.system))
    if args.message is not None:
        answer_messages(session, args.message)
    elif sys.stdin.isatty():
        session.say("banner", **_facts(args.model, model, answerer, words))
        converse(session)
    else:
        answer_pipe(session, PipeLines(sys.stdin.buffer))
    return 0


def _speak_utf8() -> None:
    """UTF-8 whatever the console says: a redirected Windows console has a code page that lacks Chinese."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace" if stream is sys.stderr else "strict")


def _check_texts(args: argparse.Namespace) -> None:
    """Refuse texts of the command line that are none, and a standard input that is closed."""
    for flag, texts in (("--system", [args.system]), ("--message", args.message or [])):
        try:
            refuse_surrogates(texts)  # which undecodable bytes of the command line arrive as
        except ValueError as error:
            raise UserError(f"{flag} is not UTF-8 ({error}); convert it first") from error
    if any(not text.strip() for text in args.message or []):
        raise UserError("--message is empty; give it a text")
    if args.message is None and sys.stdin is None:
        raise UserError("standard input is closed; open it, or give --message")


def _facts(path: Path, model: PreTrainedModel, answerer: Answerer, words: Words) -> dict[str, object]:
    """What the banner tells."""
    return {
        "model": path,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": model.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "positions": f"{answerer.limit:,}" if answerer.limit < float("inf") else words("no_limit"),
    }


@contextmanager
def _as_user_errors(words: Words, place: Callable[[str], str] = str) -> Iterator[None]:
    """End the command with what was refused, in the chosen language."""
    try:
        yield
    except RefusedError as error:
        raise UserError(place(words.refusal(error))) from error


# ---------------------------------------------------------------------------------------------------------------
# Where messages come from
# ---------------------------------------------------------------------------------------------------------------


def answer_messages(session: Session, messages: Sequence[str]) -> None:
    """Answer some messages, each as it stands.

    Raises:
        UserError: if one is refused.
    """
    with _as_user_errors(session.words):
        for text in messages:
            session.take(Message(text))


def answer_pipe(session: Session, lines: PipeLines) -> None:
    """Answer the messages of a pipe, and carry out its commands.

    Raises:
        UserError: if one is refused, with the number of its line.
    """

    def place(reason: str) -> str:
        return session.words("line", number=lines.number, reason=reason)

    with _as_user_errors(session.words, place):
        while not session.is_over:
            try:
                message = read_message(lines, tuple(COMMANDS))
            except EOFError:
                return
            session.take(message)


def converse(session: Session) -> None:
    """Talk with the user of a terminal, until they leave."""
    lines = TerminalLines()
    edit_lines(complete)
    hinted = False
    with session.interrupts.watched():
        while not session.is_over:
            try:
                with session.interrupts.raised():
                    message = read_message(lines, tuple(COMMANDS))
                hinted = False
                session.take(message)
            except RefusedError as error:
                hinted = False
                session.tell(session.words.refusal(error))
            except EOFError:
                session.tell("")
                return
            except KeyboardInterrupt:
                if hinted:
                    return
                hinted = True
                session.say("interrupt_hint")
