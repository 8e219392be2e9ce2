r"""How messages are read: lines from a terminal or a pipe, and the rules for messages of several lines.

- A line that ends in one backslash goes on in the next.
- Three double quotes begin a block, alone or behind a command's name; the block ends with a line that ends in them.
- A line that begins with / is a command; one that begins with // is a message that begins with /.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from ..data.sources import MAX_DOCUMENT_BYTES
from .chat_words import RefusedError

FENCE = '"""'
PROMPT, PROMPT_WITHIN = "> ", ". "


@dataclass(frozen=True)
class Message:
    """What was typed: a message (`command` is None), or a command with what stands behind its name."""

    text: str
    command: str | None = None


class Lines(Protocol):
    """Where lines come from."""

    def read(self, prompt: str) -> str:
        """The next line without its end; pasted text may hold several.

        Raises:
            EOFError: at the end.
            RefusedError: for a line that is not UTF-8, or too long.
        """


class PipeLines:
    """The lines of a stream of bytes.

    Args:
        stream: of UTF-8; a byte order mark at its beginning is left out.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.number = 0
        """Of the line that was read last, from 1."""

    def read(self, prompt: str) -> str:
        """The next line; see `Lines`."""
        line = self._stream.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            raise EOFError
        self.number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            raise RefusedError("too_large", limit=MAX_DOCUMENT_BYTES)
        encoding = "utf-8-sig" if self.number == 1 else "utf-8"
        return _decode(line, encoding).removesuffix("\n").removesuffix("\r")


class TerminalLines:
    """Lines that are typed; with editing and a history where Python has readline."""

    def read(self, prompt: str) -> str:
        """The next line; see `Lines`.

        Raises:
            KeyboardInterrupt: for Ctrl-C at the beginning of a message.
            RefusedError: for Ctrl-C within one.
        """
        try:
            return self._read(prompt)
        except UnicodeDecodeError as error:
            raise RefusedError("not_utf8", reason=error) from error
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            if prompt == PROMPT:
                raise
            raise RefusedError("message_dropped") from None

    @staticmethod
    def _read(prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        # The answers go elsewhere: `input` would write its prompt among them.
        sys.stderr.write(prompt)
        sys.stderr.flush()
        return PipeLines(sys.stdin.buffer).read(prompt)


def edit_lines(complete: Callable[[str, str], Sequence[str]]) -> None:
    """Set up readline, if Python has one: a history for this run, pasted text as one message, completion by Tab.

    Args:
        complete: from the line and the word that is typed to what the word can become.
    """
    try:
        import readline  # noqa: PLC0415  (Windows has none)
    except ImportError:
        return

    def option(word: str, number: int) -> str | None:
        found = complete(readline.get_line_buffer(), word)
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(option)
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
        return
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")


def read_message(lines: Lines, commands: Sequence[str]) -> Message:
    """The next message or command; see the module for the rules.

    Args:
        lines: where it comes from.
        commands: their names. Pasted text of several lines is a command only if it begins with one of them.

    Raises:
        EOFError: if nothing is left.
        RefusedError: for a block that is never closed, and what `Lines.read` refuses.
    """
    line = lines.read(PROMPT)
    opened = _open_block(line)
    if opened is not None:
        command, rest = opened
        return Message(_read_block(lines, rest), command)
    text = _read_continued(lines, line)
    if text.startswith("/"):
        pasted = "\n" in line
        if text.startswith("//"):
            return Message(text if pasted else text[1:])
        words = text[1:].split(maxsplit=1)
        name = words[0] if words else ""
        if not text[1:2].isspace() and (not pasted or name in commands):
            return Message(words[1].rstrip() if len(words) > 1 else "", name)
    return Message(text)


def _open_block(line: str) -> tuple[str | None, str] | None:
    """The command in front of a block and what stands behind its fence, or None for a line that begins no block."""
    before, fence, rest = line.partition(FENCE)
    before = before.strip()
    if not fence or (before and (not before.startswith("/") or before.startswith("//") or len(before.split()) != 1)):
        return None
    return (before[1:] or None) if before else None, rest


def _read_block(lines: Lines, rest: str) -> str:
    """A block from behind its opening fence to its closing one."""
    collected: list[str] = []
    size = 0
    while True:
        size += len(rest) + 1
        if size > MAX_DOCUMENT_BYTES:
            raise RefusedError("too_large", limit=MAX_DOCUMENT_BYTES)
        if rest.rstrip().endswith(FENCE):
            break
        collected.append(rest)
        try:
            rest = lines.read(PROMPT_WITHIN)
        except EOFError as error:
            raise RefusedError("unclosed") from error
    last = rest.rstrip().removesuffix(FENCE)
    # A fence may have a line of its own.
    first_to_take = 1 if collected and not collected[0] else 0
    return "\n".join([*collected[first_to_take:], *([last] if last.strip() or not collected else [])])


def _read_continued(lines: Lines, line: str) -> str:
    r"""A line with those that follow it as long as each ends in one `\`."""
    collected: list[str] = []
    size = 0
    while line.endswith("\\") and not line.endswith("\\\\"):
        collected.append(line[:-1])
        size += len(line)
        if size > MAX_DOCUMENT_BYTES:
            raise RefusedError("too_large", limit=MAX_DOCUMENT_BYTES)
        try:
            line = lines.read(PROMPT_WITHIN)
        except EOFError:  # it comes again, for the next message
            return "\n".join(collected)
    return "\n".join([*collected, line])


def _decode(line: bytes, encoding: str) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise RefusedError("not_utf8", reason=error) from error
