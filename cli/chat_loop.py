"""The loop of a chat in a terminal: ask, reply, save; and the reply to a single question from a pipe.

`chat.py` makes these from flags. Ctrl-C while the model writes stops the reply; everything else that goes wrong in a
turn is said, and the chat goes on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoomr_local.errors import EngineError, SessionError, UnsupportedModel, UsageError, ZoomrError
from zoomr_local.events import Event, Finished
from zoomr_local.thinking import ThinkingLimits, budget_of

from .chat_commands import Commands
from .chat_input import Keys, LineEditor, unquoted
from .chat_leave import Leaving
from .chat_store import LAST, ChatStore
from .chat_view import ReplyView, Screen, visible
from .summaries import say

if TYPE_CHECKING:
    from zoomr_local.conversation import Conversation
    from zoomr_local.engine import Engine
    from zoomr_local.sampling import SamplingParams
    from zoomr_local.session import Saved
    from zoomr_local.trace_record import Recorder

    from .chat_models import ChatModels

TEXT, NOTHING = "text", "nothing"
"""What a save that failed has saved."""


class ChatLoop:
    """One chat: a conversation, how it is sampled and drawn, and where it is saved (``name`` None: nowhere)."""

    def __init__(
        self, talk: Conversation, store: ChatStore, screen: Screen, sampling: SamplingParams, max_tokens: int,
        think_budget: str, thinking: str, name: str | None,
    ) -> None:
        self.talk, self.store, self.screen = talk, store, screen
        self.sampling, self.max_tokens, self.think_budget, self.thinking = sampling, max_tokens, think_budget, thinking
        self.name = name
        self.places: dict[Path, Any] = {}  # where this conversation is saved, and which save is its own, so that another one loses nothing
        self.asked = False  # whether it was asked by name that this conversation be kept
        self.rescue = "/export FILE writes its text, /save NAME tries another place"  # what can be done where nothing could be saved
        self.last: Finished | None = None
        self.models: ChatModels | None = None
        self._recorded: Any = None  # the generation that the recorder knows
        self._keys = Keys(lambda: self.engine.answer_now())
        self._leaving = Leaving()
        self._failed: str | None = None  # TEXT or NOTHING, if the last save after a turn failed
        self._save_failed = False  # whether the last /save did
        self._told: set[str] = set()
        self._warned: str | None = None  # what was answered by what it would lose

    @property
    def engine(self) -> Engine:
        """The engine of the model that the conversation is with."""
        return self.talk.engine

    @property
    def recorder(self) -> Recorder | None:
        """What records this chat, if anything does."""
        return None if self.models is None else self.models.recorder

    @property
    def model_name(self) -> str:
        """The model's own name."""
        return self.talk.model.name

    @property
    def budget_tokens(self) -> int | None:
        """The budget of cells; None where there is none."""
        return None if self.engine.policy.unit == "all" else self.engine.config.kv_budget

    def limits(self) -> ThinkingLimits:
        """What ends thinking in the next reply."""
        return budget_of(self.think_budget, self.max_tokens)

    def note(self) -> dict[str, Any]:
        """What is saved with the conversation besides its turns."""
        return {"model": str(self.talk.model.path), "policy": self.engine.config.policy}

    # in a terminal

    def answer(self, question: str) -> Finished | None:
        """The reply to a single question from a pipe. SIGTERM and Ctrl-C stop it; what was written is saved where the chat is."""
        with self._leaving.heard():
            return self.reply(lambda: self.talk.send(question, self.sampling, self.max_tokens, self.limits()), terminal=False)

    def run(self, editor: LineEditor) -> None:
        """Ask and answer until Ctrl-D or /exit. Raises SystemExit(130) for SIGTERM or a closed window, after what was written is saved."""
        with self._leaving.heard():
            self._run(editor)

    def _run(self, editor: LineEditor) -> None:
        commands, self._warned = Commands(self), None
        while True:
            try:
                typed = editor.ask(self._keys.typed_ahead())
            except KeyboardInterrupt:
                self.screen.say("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                if self.may_lose("Ctrl-D or /exit once more leaves"):
                    return
                continue
            warned = self._warned
            try:
                self._obey(commands, typed)
            except EOFError:
                if self.may_lose("Ctrl-D or /exit once more leaves"):
                    return
                continue
            except BrokenPipeError:
                raise
            except (ZoomrError, OSError) as error:
                self.screen.say(f"error: {_said(error)}")
            except KeyboardInterrupt:
                self.screen.say("interrupted")
            if self._warned == warned:
                self._warned = None

    def may_lose(self, again: str) -> bool:
        """False once where what was said is kept nowhere; ``again`` is said with it: what to type if it may be lost."""
        if self._failed != NOTHING or not self.talk.turns or self._warned == again:
            return True
        self._warned = again
        self.screen.say(f"what was said last is kept nowhere: {self.rescue}; {again}")
        return False

    def _obey(self, commands: Commands, typed: str) -> None:
        text: str | None = unquoted(typed)
        if typed.startswith("/"):
            text = commands.run(text)
        if text:
            message = text
            self.reply(lambda: self.talk.send(message, self.sampling, self.max_tokens, self.limits()))

    def reply(self, start: Callable[[], Iterator[Event]], terminal: bool = True) -> Finished | None:
        """Draw the events of one turn and save the conversation; None if the turn broke off.

        Told to end meanwhile, it stops and saves, and raises SystemExit(130) in a ``terminal``.
        """
        with self._leaving.after(lambda: self.engine.cancel(), leave=terminal):
            return self._reply(start, terminal)

    def _reply(self, start: Callable[[], Iterator[Event]], terminal: bool) -> Finished | None:
        view = ReplyView(self.screen, self.budget_tokens, self.thinking, keys=terminal)
        self.last, before = None, [*self.talk.turns]
        if self.recorder is not None:
            self.recorder.turn()
        with _stoppable(self.engine.cancel) as stopped, self._keys.listening() if terminal else nullcontext():
            for event in start():
                if stopped() or self._leaving.told:  # perhaps before there was a generation that could be cancelled
                    self.engine.cancel()
                if self.recorder is not None:
                    self.recorder.feed(event)
                with self._leaving.writing():
                    view.feed(event)
                    if terminal:
                        self._keys.poll()
                if isinstance(event, Finished):
                    self.last = event
        self._recorded = self.engine.generation if self.recorder is not None else None
        if self.talk.turns != before or self._failed is not None:  # else what is saved has the same text, and its cache still
            self.autosave()
        return self.last

    def whole(self) -> AbstractContextManager[None]:
        """What is in this block is not cut in two by SIGTERM or a closed window; the chat ends after it then."""
        return self._leaving.after(lambda: None)

    def happened(self, told: list[Event], recorded: list[Event]) -> None:
        """Events between two turns: say some, record all. A recorder that has not seen this generation sees it as it is then."""
        view = ReplyView(self.screen, self.budget_tokens, self.thinking)
        for event in told:
            view.feed(event)
        if self.recorder is not None and self.engine.generation is self._recorded:
            for event in recorded:
                self.recorder.feed(event)

    def change_model(self, name: str) -> None:
        """Go on with the model ``name``. Raises ZoomrError, with the old model in place, if it cannot be taken."""
        if self.models is None:
            raise UsageError("this chat cannot change its model")
        try:
            tokens = self.models.change(name, self.talk.change_model, self.screen.say)
        except (ZoomrError, OSError) as error:
            raise ZoomrError(f"{_said(error)}; {self.model_name} stays") from None
        self.last = self._recorded = None
        say(self.engine, self.screen.quiet)
        budget = "" if self.budget_tokens is None else f", {self.budget_tokens:,} cells"
        turns = len(self.talk.turns)
        read = f"; the next message reads the conversation again: {turns} turn{'s' * (turns != 1)}, {tokens:,} tokens" if turns else ""
        self.screen.say(f"{self.model_name}, policy {self.engine.config.policy}{budget}{read}")

    # keeping it

    @property
    def failed(self) -> bool:
        """Whether what was to be kept by name is not there, or not as a whole."""
        named = self.asked or self.name not in (None, LAST)
        return self._save_failed or (named and self._failed is not None)

    def autosave(self) -> None:
        """Save what was said, changed or taken back. What goes wrong is said once and does not end the chat."""
        if self.name is None:
            return
        place = self.store.path(self.name)
        if not self.talk.turns and place.resolve() not in self.places:
            return
        try:
            with self.whole():
                saved, self._failed = self.keep(place)
        except KeyboardInterrupt:
            self._failed = NOTHING
            self.screen.say("warning: this turn is not saved; /save NAME saves it, and so does the next turn")
            raise
        except (ZoomrError, OSError) as error:
            if self._failed != NOTHING:
                self.screen.say(f"warning: the conversation is not saved: {error}; {self.rescue}")
            self._failed = NOTHING

    def keep(self, place: Path) -> tuple[Saved, str | None]:
        """Save the conversation in ``place``: with its cache or, which is said once, its text alone.

        Returns TEXT as well if its cache should have been saved and could not. Raises ZoomrError or OSError, with what was
        saved there before whole, if nothing could.
        """
        self.store.make()
        own, failed = place.resolve() in self.places, None
        there = self.store.version(place)
        if there is not None and there != self.places.get(place.resolve()) and (own or place != self.store.path(LAST)):
            raise SessionError(f"{place} holds what another chat has saved there meanwhile, which is left as it is")
        try:
            saved = self.talk.save(place, self.note())
            self._told.discard(TEXT)
        except UnsupportedModel as error:
            saved = self.talk.save_text(place, self.note(), f"the model's cache cannot be saved. {error}")
            self._tell_once(self.model_name, f"note: the text is saved alone. {error}")
        except (SessionError, EngineError, OSError) as error:
            try:
                saved, failed = self.talk.save_text(place, self.note(), "its cache could not be saved"), TEXT
            except (SessionError, OSError):
                raise error from None
            self._tell_once(TEXT, f"warning: the text alone is saved in {place}, and the next start reads it again: {error}")
        finally:  # also after a Ctrl-C that came when all was written
            if (now := self.store.version(place)) not in (None, there):
                self.places[place.resolve()] = now
        return saved, failed

    def _tell_once(self, what: str, text: str) -> None:
        if what not in self._told:
            self.screen.say(text)
        self._told.add(what)

    def save_as(self, name: str) -> Saved:
        """What /save does. Raises UsageError for a name that holds another conversation, ZoomrError if nothing could be saved."""
        place = self.store.path(name)
        if self.store.holds(name) and place.resolve() not in self.places:
            raise UsageError(f"{name} holds another conversation; choose another name, or /load {name} to go on with it")
        self._save_failed = True
        self._told.discard(TEXT)
        try:
            with self.whole():
                saved, failed = self.keep(place)
        except OSError as error:
            raise SessionError(f"cannot save in {place}: {error.strerror}; /export FILE writes the text") from None
        self._save_failed = failed is not None
        if self._failed == NOTHING:  # where it was to be saved it cannot be, so it is saved here from now on
            self.name = name
        self._failed = failed
        return saved

    def clear(self) -> str | None:
        """Forget the conversation here; what is saved of it stays, and the next one has no name. Returns the name its turns are saved under."""
        name, turns = self.name, len(self.talk.turns)
        saved = name is not None and self.store.path(name).resolve() in self.places and self.store.holds(name)
        self.talk.clear()
        self.places, self.last = {}, None
        if not saved:
            return None
        self.name, self.asked = LAST, False
        return name if turns else None

    def load(self, name: str, tell: Callable[[str], None]) -> None:
        """Take up the conversation ``name`` and ``tell`` where it stands. Raises SessionError."""
        place = self.store.path(name)
        there = self.store.version(place)
        self.talk.load(place)
        self.places, self.last, self._failed = {place.resolve(): there}, None, None
        self.name = name if self.name is not None else None
        turns = self.talk.turns
        last = " ".join(visible(turns[-1].user).split())[:60] if turns else "-"
        tell(f"{name}: {len(turns)} turn{'s' * (len(turns) != 1)}, the last one: {last}")
        if self.talk.again is not None:
            tell(f"the next message reads the conversation again: {self.talk.again}")


@contextmanager
def _stoppable(cancel: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """While this lasts the first Ctrl-C ends the reply after its current token; the second raises KeyboardInterrupt.

    The yielded function says whether there was one.
    """
    seen: list[int] = []

    def stop(number: int, frame: object) -> None:
        seen.append(number)
        cancel()
        if len(seen) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def _said(error: Exception) -> str:
    """What an error says; of the system's with the file that it is about."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def default_name(session: str | None, save: bool, goes_on: bool) -> str | None:
    """The name a conversation is saved under: the one that was given, else `last` for those that are gone on with."""
    return (session or (LAST if goes_on else None)) if save else None


def history_file(store: ChatStore, save: bool) -> Path | None:
    """The file of what was typed; None if nothing is to be written, or nothing can."""
    if not save:
        return None
    try:
        return store.private_history()
    except OSError:
        return None
