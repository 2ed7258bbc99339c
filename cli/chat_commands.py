"""The commands of a chat: what a line that begins with a slash does.

A command is a method whose name begins with ``do_``; its docstring is its help. `chat_loop.py` calls `Commands.run`;
those that look into the cache are in `chat_cache.py`.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from zoomr_local.errors import SessionError, UsageError
from zoomr_local.files import write_new
from zoomr_local.thinking import budget_of

from . import chat_view
from .chat_cache import CacheCommands
from .chat_editor import edited
from .chat_input import decoded
from .chat_store import LAST, user_path
from .chat_view import visible

if TYPE_CHECKING:
    from .chat_loop import ChatLoop

_FLOATS = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p", "repeat_penalty": "repeat_penalty"}
_WHOLE = {"top_k": "top_k", "seed": "seed", "repeat_last_n": "repeat_last_n"}
_READ_BYTES = 4 << 20


class Commands(CacheCommands):
    """The commands of one chat. A method may return text to send as the next message."""

    def __init__(self, chat: ChatLoop) -> None:
        self.chat = chat

    @classmethod
    def names(cls) -> list[str]:
        """Every command as it is typed."""
        return sorted("/" + name.removeprefix("do_") for name in dir(cls) if name.startswith("do_"))

    @classmethod
    def completions(cls, saved: list[str], models: list[str]) -> list[str]:
        """What Tab completes: the commands, and those that take a name with each that there is."""
        named = {"/help": [name[1:] for name in cls.names()], "/load": saved, "/model": models}
        return [*cls.names(), *(f"{command} {name}" for command, names in named.items() for name in names)]

    def run(self, line: str) -> str | None:
        """Do what ``line`` says. Raises UsageError with the nearest name for an unknown command."""
        name, *rest = line[1:].split(maxsplit=1) if line[1:2].strip() else [""]
        do: Callable[[str], str | None] | None = getattr(self, f"do_{name}", None)
        if do is None:
            near = difflib.get_close_matches("/" + name, self.names(), n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them."
            raise UsageError(f"there is no command /{name}; {hint} A message that begins with a slash: put a space in front of it")
        return do(rest[0].strip() if rest else "")

    # the conversation

    def do_help(self, rest: str) -> None:
        """/help [COMMAND]: what there is, and the keys."""
        if rest:
            do = getattr(self, f"do_{rest.removeprefix('/')}", None)
            if do is None:
                raise UsageError(f"there is no command {rest}; /help lists them")
            self._print([do.__doc__])
            return
        self._print([getattr(self, f"do_{name[1:]}").__doc__ for name in self.names()])
        self._print(["", 'Enter sends, Alt-Enter is a new line, """ begins and ends a block of lines, Ctrl-G opens $EDITOR,',
                     "Ctrl-C stops the reply and keeps it, Ctrl-T ends its thinking and asks for the answer, Ctrl-D leaves."])  # fmt: skip

    def do_exit(self, rest: str) -> None:
        """/exit: leave; Ctrl-D does too."""
        raise EOFError

    def do_clear(self, rest: str) -> None:
        """/clear: forget every turn, with its cache; the system message stays. What is saved stays, and the next conversation has no name."""
        name = self.chat.clear()
        back = "" if name is None else f"; until your next message takes its place, /load {name} brings it back" if name == LAST else (
            f"; {name} stays as it was saved: /load {name} goes on with it")  # fmt: skip
        self._say("everything that was said is forgotten" + back)

    def do_undo(self, rest: str) -> None:
        """/undo: take the last turn back."""
        turn = self.chat.talk.undo()
        self.chat.autosave()
        self._say(f"taken back: {_short(turn.user)}")

    def do_regen(self, rest: str) -> None:
        """/regen: answer the last question again, with the next seed."""
        if not self.chat.talk.turns:
            raise UsageError("there is no reply to write again")
        self.chat.reply(lambda: self.chat.talk.regenerate(self.chat.sampling, self.chat.max_tokens, self.chat.limits()))

    def do_edit(self, rest: str) -> None:
        """/edit: open your last message in $VISUAL or $EDITOR, and ask it anew in place of what it was."""
        if not self.chat.talk.turns:
            raise UsageError("there is no message to edit; Ctrl-G edits the one that you type")
        old = self.chat.talk.turns[-1].user
        text = edited(old, self.chat.whole)
        if not text.strip():
            raise UsageError("nothing is left of the message, so it stays as it was; /undo takes it back")
        if text == old:
            self._say("the message is as it was; /regen answers it again")
            return
        chat = self.chat
        chat.reply(lambda: chat.talk.ask_instead(text, chat.sampling, chat.max_tokens, chat.limits()))

    def do_model(self, rest: str) -> None:
        """/model [NAME]: go on with another model (a file, user/repo[:quant] or a bundled name); the text is kept."""
        if rest:
            self.chat.change_model(rest)
        else:
            self._say(f"model: {self.chat.model_name} ({self.chat.talk.model.path})")

    def do_system(self, rest: str) -> None:
        """/system [TEXT | -]: show the system message, change it, or take it away."""
        if rest:
            self.chat.talk.set_system(None if rest == "-" else rest)
            self.chat.autosave()
        self._say(f"system: {self.chat.talk.system or '(none)'}")

    def do_read(self, rest: str) -> str:
        """/read FILE [QUESTION]: send a text file, with a question behind it; FILE may have spaces."""
        words = rest.split(" ")
        most = next((n for n in range(len(words), 1, -1) if os.path.isfile(user_path(" ".join(words[:n])))), 1)
        name, question = " ".join(words[:most]), " ".join(words[most:])
        if not name:
            raise UsageError("/read FILE [QUESTION]")
        try:
            with user_path(name).open("rb") as file:
                data = file.read(_READ_BYTES + 1)
        except OSError as error:
            raise UsageError(f"cannot read {name}: {error.strerror}") from None
        if len(data) > _READ_BYTES:
            raise UsageError(f"{name} is longer than {_READ_BYTES >> 20} MiB, too long for one message")
        if not data.strip():
            raise UsageError(f"{name} is empty")
        text = decoded(data, name, self._say)
        return f"{text}\n\n{question}" if question else text

    # keeping it

    def do_save(self, rest: str) -> None:
        """/save NAME: keep the conversation under a name, or in a directory (a name with a slash)."""
        if not rest:
            raise UsageError("/save NAME")
        self.chat.store.path(rest)
        if not self.chat.talk.turns:
            raise UsageError("nothing was said yet, so there is nothing to save")
        cached, saved = self.chat.talk.has_cache, self.chat.save_as(rest)
        size = chat_view.human_bytes(saved.total_bytes) + ("" if cached else ", the text alone")
        self._say(f"saved: {saved.path} ({size}); to go on with it: zoomr chat --session {rest} --continue")

    def do_load(self, rest: str) -> None:
        """/load [NAME]: take up a conversation; without a name, list them."""
        if not rest:
            self._print(self.chat.store.names() or ["nothing is saved"])
            return
        if self.chat.may_lose(f"/load {rest} once more drops it"):
            try:
                self.chat.load(rest, self._say)
            except SessionError as error:
                raise SessionError(f"{error}; /load lists what there is") from None

    def do_export(self, rest: str) -> None:
        """/export FILE: write the conversation as Markdown, or as JSON if the name ends in .json; never over a file."""
        if not rest:
            raise UsageError("/export FILE")
        talk = self.chat.talk
        if not talk.turns:
            raise UsageError("nothing was said yet, so there is nothing to write")
        if rest.endswith(".json"):
            text = json.dumps({"system": talk.system, "turns": [asdict(turn) for turn in talk.turns]}, indent=1) + "\n"
        else:
            parts = [f"**System**\n\n{talk.system}\n"] if talk.system else []
            parts += [f"**You**\n\n{turn.user}\n\n**{self.chat.model_name}**\n\n{turn.answer.strip()}\n" for turn in talk.turns]
            text = "\n".join(parts)
        try:
            write_new(user_path(rest), text)
        except OSError as error:
            raise UsageError(f"cannot write {rest}: {error.strerror}") from None
        self._say(f"written: {rest}")

    # numbers

    def do_stats(self, rest: str) -> None:
        """/stats: tokens, seconds and the cache's counters."""
        budget = self.chat.budget_tokens
        self._print(chat_view.stats_lines(self.chat.talk.turns, self.chat.last, budget))

    # settings

    def do_set(self, rest: str) -> None:
        """/set [NAME [VALUE]]: show or change temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, max_tokens."""
        chat = self.chat
        name, _, value = rest.partition(" ")
        value = value.strip()
        if value:
            try:
                if name == "max_tokens":
                    number = int(value)
                    if number < 1:
                        raise UsageError("max_tokens must be at least 1")
                    chat.max_tokens = number
                elif name in _FLOATS:
                    chat.sampling = replace(chat.sampling, **{_FLOATS[name]: float(value)})
                elif name in _WHOLE:
                    chat.sampling = replace(chat.sampling, **{_WHOLE[name]: int(value)})
            except ValueError:
                raise UsageError(f"/set {name} {value}: {value!r} is no number that it could be") from None
        values = {known: getattr(chat.sampling, field) for known, field in {**_FLOATS, **_WHOLE}.items()}
        values["max_tokens"] = chat.max_tokens
        if name and name not in values:
            raise UsageError(f"/set {name}: there are {', '.join(values)}")
        shown = values if value or not name else {name: values[name]}
        self._say(", ".join(f"{known} {number}" for known, number in shown.items()))

    def do_think(self, rest: str) -> None:
        """/think [show|fold|hide | N|auto|off]: how thinking is shown; how many tokens of it a reply may have."""
        if rest in (chat_view.SHOW, chat_view.FOLD, chat_view.HIDE):
            self.chat.thinking = rest
        elif rest:
            budget_of(rest, self.chat.max_tokens)
            self.chat.think_budget = rest
        limit = self.chat.limits().budget_tokens
        self._say(f"thinking: {self.chat.thinking}; at most {'any number of' if limit is None else f'{limit:,}'} tokens a reply")


def _short(text: str, most: int = 60) -> str:
    words = " ".join(visible(text).split())
    return words if len(words) <= most else words[: most - 2] + ".."
