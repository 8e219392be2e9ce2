"""The session of `doge-lm chat`: takes messages and commands, keeps the conversation, and writes answers."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import TextIO

from .chat_input import Message
from .chat_words import RefusedError, Words
from .conversation import Answerer, Conversation, Exchange
from .decoding import Sampling
from .settings import MIN_TEMPERATURE, SETTING_TYPES, check_settings

OVERWRITE = "--overwrite"

# What a model writes must not steer the terminal: control characters but tab and line feed are shown as pictures.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Interrupts:
    """Ctrl-C: noted while the model writes, raised while a line is read.

    So it never breaks into the middle of a step, unless it is pressed again before the step has ended.
    """

    def __init__(self) -> None:
        self.is_watching = False
        self._raises = False
        self._noted = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take care of Ctrl-C meanwhile. Only the main thread can; in another nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._take)
        self.is_watching = True
        try:
            yield
        finally:
            self.is_watching = False
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Let Ctrl-C raise KeyboardInterrupt at once, and one that came just before as well."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if one was noted."""
        if self._noted:
            self._noted = False
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._raises or self._noted:
            self._noted = False
            raise KeyboardInterrupt
        self._noted = True


class Session:
    """A conversation with its settings; takes messages and commands, and writes answers.

    Args:
        answerer: the model.
        settings: how tokens are chosen. With a seed, the draws of an answer follow from it and from the number of
            answers since it was set, so that a session can be repeated and another try is another answer.
        words: the program's own.
        conversation: to begin with.
        out: takes the answers; standard output by default.
        err: takes all else; standard error by default.

    Raises:
        RefusedError: if `max_new_tokens` leaves no room for a question.
    """

    def __init__(
        self,
        answerer: Answerer,
        settings: Sampling,
        words: Words,
        conversation: Conversation | None = None,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self._answerer = answerer
        self._check_room(settings)
        self.settings = settings
        self.words = words
        self.conversation = conversation or Conversation()
        self.interrupts = Interrupts()
        self.is_over = False
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._is_shown = self._out.isatty()
        self._draws = 0
        self._left_out = 0

    def take(self, message: Message) -> None:
        """Answer a message or carry out a command; nothing is done for a blank message.

        Raises:
            RefusedError: if it cannot be done; the conversation is as before.
            KeyboardInterrupt: if Ctrl-C was pressed and nobody watches (`Interrupts`).
        """
        if message.command is not None:
            self._carry_out(message.command, message.text)
        elif message.text.strip():
            self._ask(message.text)

    def say(self, key: str, **fields: object) -> None:
        """Say something in the program's own words."""
        self.tell(self.words(key, **fields))

    def tell(self, text: str) -> None:
        """Write a line to the user."""
        self._err.write(visible(text) + "\n")
        self._err.flush()

    # ----------------------------------------------------------------------------------------------- answers

    def _ask(self, question: str) -> None:
        """Answer a question, and keep both."""
        prompt = self._answerer.fit(self.conversation, question, self.settings.max_new_tokens)
        self._tell_left_out(prompt.left_out)
        settings = self.settings
        if settings.seed is not None:
            settings = replace(settings, seed=(settings.seed + self._draws) % 2**63)
        self._draws += 1
        said: list[str] = []
        stopped = ended = False

        def show(text: str) -> None:
            said.append(text)
            self._show(text)
            self.interrupts.check()

        try:
            ended = self._answerer.answer(prompt.ids, settings, show)
        except KeyboardInterrupt:
            if not self.interrupts.is_watching:
                raise
            stopped = True
        self._show("\n")
        self._keep(question, "".join(said), ended=ended, stopped=stopped)

    def _keep(self, question: str, answer: str, *, ended: bool, stopped: bool) -> None:
        """Keep what was said, and tell how it ended if it is not plain to see."""
        if stopped and not answer:
            self.say("stopped_empty")
            return
        self.conversation.exchanges.append(Exchange(question, answer))
        if stopped:
            self.say("stopped")
        elif not ended:
            self.say("cut_off", tokens=self.settings.max_new_tokens)
        elif not answer.strip():
            self.say("empty_answer")

    def _show(self, text: str) -> None:
        if text:
            self._out.write(visible(text) if self._is_shown else text)
            self._out.flush()

    def _tell_left_out(self, count: int) -> None:
        if count > self._left_out:
            self.say("left_out", count=count, limit=self._answerer.limit)
        self._left_out = count

    def _check_room(self, settings: Sampling) -> None:
        if settings.max_new_tokens >= self._answerer.limit:
            raise RefusedError("no_room", tokens=settings.max_new_tokens, limit=self._answerer.limit)

    # ---------------------------------------------------------------------------------------------- commands

    def _carry_out(self, name: str, argument: str) -> None:
        if name not in COMMANDS:
            raise RefusedError("unknown_command", name=name, nearest=_nearest(name, COMMANDS, "help"))
        if argument and name in _WITHOUT_ARGUMENT:
            raise RefusedError("no_argument", name=name)
        COMMANDS[name](self, argument)

    def _help(self, _: str) -> None:
        usage = {"system": "/system [TEXT]", "set": "/set [NAME [VALUE]]", "save": "/save [--overwrite] FILE"}
        usage["load"] = "/load FILE"
        rows = [(usage.get(name, f"/{name}"), f"help_{name}") for name in COMMANDS]
        width = max(len(form) for form, _ in rows)
        names = ", ".join(SETTING_TYPES)
        self.say("help_head")
        for form, key in rows:
            self.tell(f"  {form:{width}}  {self.words(key, names=names)}")
        self.say("help_tail")

    def _system(self, text: str) -> None:
        if text:
            text = "" if text == '""' else text
            self._answerer.template.check_system(text)
            self.conversation.system = text
            self.say("system_set" if text else "system_removed")
        elif self.conversation.system:
            self.say("system_now", text=self.conversation.system)
        else:
            self.say("system_none")

    def _set(self, argument: str) -> None:
        name, value = [*argument.replace("=", " ", 1).split(maxsplit=1), "", ""][:2]
        if name and name not in SETTING_TYPES:
            raise RefusedError("unknown_setting", name=name, nearest=_nearest(name, SETTING_TYPES, "temperature"))
        if value:
            self._change_setting(name, value)
        for shown in [name] if name else SETTING_TYPES:
            found = getattr(self.settings, shown)
            self.say("setting", name=shown, value=self.words("value_none") if found is None else found)

    def _change_setting(self, name: str, text: str) -> None:
        try:
            value = None if name == "seed" and text == "none" else SETTING_TYPES[name](text)
            settings = check_settings({**asdict(self.settings), name: value})
        except ValueError as error:
            raise RefusedError(f"bad_{name}", value=text, least=MIN_TEMPERATURE) from error
        self._check_room(settings)
        self.settings = settings
        if name == "seed":
            self._draws = 0

    def _retry(self, _: str) -> None:
        last = self._take_back()
        if self.settings.temperature == 0:
            self.say("same_answer")
        count = len(self.conversation.exchanges)
        try:
            self._ask(last.question)
        finally:
            if len(self.conversation.exchanges) == count:  # refused, or stopped before a word
                self.conversation.exchanges.append(last)

    def _undo(self, _: str) -> None:
        self.say("undone", question=self._take_back().question)

    def _take_back(self) -> Exchange:
        if not self.conversation.exchanges:
            raise RefusedError("nothing_said")
        return self.conversation.exchanges.pop()

    def _reset(self, _: str) -> None:
        self.conversation.exchanges.clear()
        self._left_out = 0
        self.say("reset")

    def _save(self, argument: str) -> None:
        first, _, rest = argument.partition(" ")
        overwrite = first == OVERWRITE
        path = self._path("save", rest.strip() if overwrite else argument)
        self.conversation.save(path, overwrite=overwrite)
        self.say("saved", path=path)

    def _load(self, argument: str) -> None:
        conversation = Conversation.load(self._path("load", argument))
        self._answerer.template.check_system(conversation.system)
        self.conversation = conversation
        self._left_out = 0
        last = conversation.exchanges[-1]
        self.say("loaded", count=len(conversation.exchanges), question=last.question, answer=last.answer)

    @staticmethod
    def _path(command: str, name: str) -> Path:
        if not name:
            raise RefusedError("no_file_name", name=command)
        return Path(name).expanduser()

    def _exit(self, _: str) -> None:
        self.is_over = True


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "help": Session._help,
    "system": Session._system,
    "set": Session._set,
    "retry": Session._retry,
    "undo": Session._undo,
    "reset": Session._reset,
    "save": Session._save,
    "load": Session._load,
    "exit": Session._exit,
}
_WITHOUT_ARGUMENT = ("help", "retry", "undo", "reset", "exit")


def complete(line: str, word: str) -> list[str]:
    """What a word in a line can become: a command at its beginning, a setting behind /set."""
    if line.startswith("/set ") and " " not in line.removeprefix("/set "):
        return [name for name in SETTING_TYPES if name.startswith(word)]
    if line.startswith("/") and line == word:
        return [f"/{name}" for name in COMMANDS if name.startswith(word[1:])]
    return []


def _nearest(name: str, known: Iterable[str], default: str) -> str:
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=0.4)), default)


def visible(text: str) -> str:
    """A text as a terminal may be given it: control characters, which could steer it, as pictures."""
    return text.translate(_VISIBLE)
