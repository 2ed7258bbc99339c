"""A conversation: turns in, events out, and what of it is in the engine's cache.

The command line's chat drives this file; it drives `engine.py` and decides no paging. It owns the messages, and one
question: can the next turn be read behind what is in the cache, or must everything be read again? The answer is
taken from the model's own template, never from knowledge of a template. Reading again is always said.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Iterator

from . import session
from .engine import Engine
from .errors import EngineError, SessionError, UsageError, ZoomrError
from .events import Event, Finished, PrefilledAgain, Warned
from .model import Model
from .sampling import SamplingParams
from .session import Saved
from .thinking import ThinkingLimits
from .turns import BlockTurns

MARK = "zoomr-answer-5d1c"
"""Stands in an answer's place where the template is asked what follows an answer."""

NOTE_FORMAT = 1


@dataclass(frozen=True)
class Turn:
    """One question and what came of it. ``reason`` and ``thinking_cut`` as in `Finished`; sizes are tokens.

    ``prompt_tokens`` were read for it, everything that was read again included.
    """

    user: str
    answer: str
    reasoning: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    prefill_seconds: float
    decode_seconds: float
    thinking_cut: str | None = None


class Conversation:
    """Turns of one user and one model. ``again`` says why the next turn reads everything again, None if it does not.

    Between turns the engine has a generation only while the cache is that of these turns: what was taken back,
    cleared or said in another conversation is in no cell and no page, and in nothing that is saved. Under policy ``full``
    what was taken back stays in cells until the next turn, which goes back to where the texts part.
    """

    def __init__(self, model: Model, engine: Engine, system: str | None = None, keep_thinking: bool = False) -> None:
        """``keep_thinking``: thinking of earlier turns stays, as blocks that can be zoomed (under policy ``full``, in
        cells) instead of being dropped as the template drops it."""
        self.model, self.engine, self.keep_thinking = model, engine, keep_thinking
        self.system = system
        self.turns: list[Turn] = []
        self.again: str | None = None
        self._in_cache = False
        self._beside: str | None = None  # why the cache, which can go back, has more than was said
        self._retries = 0
        self._pins_gone: tuple[int, ...] = ()  # of a cache that the next turn does not go on with

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as a template takes it: answers without their thinking."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            found += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
        return found

    # one turn

    def send(
        self, text: str, sampling: SamplingParams, max_tokens: int, limits: ThinkingLimits = ThinkingLimits()
    ) -> Iterator[Event]:
        """The events of one turn; the last is `Finished`, and the turn is part of the conversation then.

        A reply that was stopped ("cancelled") is kept as it is, unless its question was not read to the end: then
        there is no turn. Raises UsageError or ModelError, with nothing changed, if the template refuses the messages.
        """
        messages, pins = [*self.messages, {"role": "user", "content": text}], self.pinned
        stream, read, again = self._begin(messages, sampling, max_tokens, limits)
        anew = again is not None or not self._in_cache  # the only turn that was taken back is not read again, and its blocks are gone
        self._in_cache, self._beside, self.again = False, None, "the last reply broke off"
        self._pins_gone, generation = () if anew else pins, self.engine.generation
        try:
            if again is not None:
                yield PrefilledAgain(read, again)
            if anew and pins:
                yield Warned(f"{_pins_of(pins)} gone: what is read again becomes other blocks")
            with closing(stream):
                for event in stream:
                    if isinstance(event, Finished):
                        self._ended(text, event, read)
                    yield event
        finally:
            if not self._in_cache and self.engine.generation is generation:
                self.engine.forget()

    def regenerate(
        self, sampling: SamplingParams, max_tokens: int, limits: ThinkingLimits = ThinkingLimits()
    ) -> Iterator[Event]:
        """The last question again, with the next seed; the old reply stays if no other comes. Raises UsageError if there is none."""
        retries = self._retries + 1
        seed = (sampling.seed + retries) % (2**32 - 1)
        try:
            yield from self.ask_instead(None, replace(sampling, seed=seed), max_tokens, limits)
        finally:
            self._retries = retries

    def ask_instead(
        self, text: str | None, sampling: SamplingParams, max_tokens: int, limits: ThinkingLimits = ThinkingLimits()
    ) -> Iterator[Event]:
        """``text`` in place of the last question (None: the same), answered; the old turn stays if no reply comes.

        Raises UsageError if there is none.
        """
        beside, old = self._beside, self.undo()
        n = len(self.turns)
        try:
            yield from self.send(old.user if text is None else text, sampling, max_tokens, limits)
        finally:
            if len(self.turns) == n:
                self.turns.append(old)
                if self._in_cache:  # nothing was begun
                    self._beside = beside

    def undo(self) -> Turn:
        """Take the last turn back and return it. Raises UsageError if there is none."""
        if not self.turns:
            raise UsageError("there is no turn to take back")
        self._leave_cache("a turn was taken back")
        return self.turns.pop()

    def clear(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns.clear()
        self._out_of_cache(None, ())

    def set_system(self, text: str | None) -> None:
        """Put ``text`` in place of the system message; None or "" is none."""
        if (text or None) != self.system:
            self.system = text or None
            self._leave_cache("the system message was changed")

    def change_model(self, model: Model, engine: Engine) -> int:
        """Go on with another model on its own engine; the next message reads the conversation there. Returns how many tokens that
        will be at least, 0 without turns. Raises UsageError or ModelError, with nothing changed, if the model's template or
        tokenizer refuses the messages."""
        tokens = len(model.tokenize(model.render(self.messages))) if self.turns else 0
        self._out_of_cache("the model was changed" if self.turns else None, self.pinned)
        self.model, self.engine = model, engine
        return tokens

    # blocks that the user holds

    @property
    def pinned(self) -> tuple[int, ...]:
        """The blocks that are pinned, ascending."""
        if not self._in_cache:
            return self._pins_gone
        blocks = self.engine.generation
        return blocks.pinned_blocks if isinstance(blocks, BlockTurns) else ()

    def pin(self, block: int) -> list[Event]:
        """Keep ``block`` in cells whatever the policy selects, until ``unpin``. Between turns; returns what moved for it.

        It comes in with the next message if the last question leaves no room for it now; `cache_view.py` tells where it is.
        Raises UsageError, with the numbers, for a block that there is not, that cannot come back or that is too long.
        """
        blocks = self._blocks()
        return blocks.hold(block, True, blocks.most_held_tokens)

    def zoom(self, block: int) -> list[Event]:
        """As ``pin``, for the next reply only."""
        blocks = self._blocks()
        return blocks.hold(block, False, blocks.most_held_tokens)

    def unpin(self, block: int) -> None:
        """Leave ``block`` to the policy again. Raises UsageError if it is not pinned."""
        self._blocks().release(block)

    def _blocks(self) -> BlockTurns:
        found = self.engine.generation
        if self.engine.policy.unit != "block":
            raise UsageError(f"policy {self.engine.policy.name} has no blocks that could be zoomed or pinned")
        if not self._in_cache and self.again is not None and self.turns:
            raise UsageError(f"the next message reads the conversation again ({self.again}), and blocks are numbered anew then")
        if not self._in_cache or not isinstance(found, BlockTurns):
            raise UsageError("nothing is in the cache yet")
        return found

    # save and load

    def save(self, directory: str | Path, note: dict[str, Any] | None = None) -> Saved:
        """Save conversation and cache to ``directory``, in place of what was saved there; ``note`` is the caller's.

        To be called between turns. Where the cache is not that of these turns the text is saved alone, as ``save_text`` does.
        Raises as `Engine.save` does.
        """
        if not self.has_cache:
            return self.save_text(directory, note, self.again or self._beside)
        return self.engine.save(directory, self._kept(note, True, None))

    def save_text(self, directory: str | Path, note: dict[str, Any] | None = None, why: str | None = None) -> Saved:
        """As ``save``, without the cache; ``why``: what whoever loads it is told. Raises SessionError."""
        return session.save_note(Path(directory), self._kept(note, False, why))

    @property
    def has_cache(self) -> bool:
        """Whether what was said, and no more, is in the cache, so that ``save`` saves it as well."""
        return self._in_cache and self._beside is None

    def _kept(self, note: dict[str, Any] | None, cached: bool, again: str | None) -> dict[str, Any]:
        return {"conversation": {
            "format": NOTE_FORMAT, "system": self.system, "turns": [asdict(turn) for turn in self.turns], "in_cache": cached,
            "again": again, "keep_thinking": self.keep_thinking, "note": note or {}, "pinned": self.pinned,
        }}  # fmt: skip

    def load(self, directory: str | Path) -> dict[str, Any]:
        """Become the conversation in ``directory``; returns the note that was saved with it.

        If its cache was made with another model or other settings, or is damaged, the text is taken over all the same,
        and ``again`` says why. Raises SessionError, with nothing changed, if there is no conversation or its text is
        damaged.
        """
        found = session.note(Path(directory))
        try:
            kept = found["conversation"]
            turns = [Turn(**turn) for turn in kept["turns"]]
            system, in_cache, again, keep = kept["system"], bool(kept["in_cache"]), kept["again"], bool(kept["keep_thinking"])
            note, version, pinned = dict(kept["note"]), kept["format"], tuple(int(b) for b in kept.get("pinned", ()))
        except (LookupError, TypeError, ValueError):
            raise SessionError(f"{directory} holds a session, but no conversation") from None
        if version != NOTE_FORMAT:
            raise SessionError(f"{directory} holds a conversation of format {version}, this version reads {NOTE_FORMAT}")
        if in_cache and keep != self.keep_thinking:
            in_cache, again = False, "--keep-thinking was changed"
        self._out_of_cache("loading another conversation broke off" if self.turns else None, self.pinned)
        if in_cache:
            try:
                self.engine.load(directory)
            except ZoomrError as error:
                in_cache, again = False, str(error)
        self.turns, self.system, self._in_cache = turns, system, in_cache
        self.again, self._pins_gone = (None, ()) if in_cache else (again if turns else None, pinned)
        return note

    # what is in the cache

    @property
    def _rewinds(self) -> bool:
        """Whether every turn goes back to where the texts part: thinking then leaves the cache as if it had never been."""
        return self.engine.policy.unit == "all" and not self.keep_thinking

    def _leave_cache(self, why: str) -> None:
        if self._in_cache and self._rewinds:
            self._beside = why
        elif self.turns:
            self._out_of_cache(why, self.pinned)

    def _out_of_cache(self, again: str | None, pins: tuple[int, ...]) -> None:
        """Nothing of what is in the cache is of use from here on, so it goes."""
        self._in_cache, self._beside, self.again, self._pins_gone = False, None, again, pins
        self.engine.forget()

    def _begin(
        self, messages: list[dict[str, str]], sampling: SamplingParams, max_tokens: int, limits: ThinkingLimits
    ) -> tuple[Iterator[Event], int, str | None]:
        """The next turn's events, the tokens that are read for it, and why everything is read again."""
        whole = self.model.tokenize(self.model.render(messages))
        again = self.again if self.turns else None
        if self._in_cache:
            tokens, kept, again = self._continuation(messages, whole)
            used = (len(self.engine.sequence) if kept is None else kept) + len(tokens) + max_tokens
            if again is None and used > self.engine.room_tokens:
                again = f"the cache was made for {self.engine.room_tokens} tokens and {used} may be needed"
            if again is None:
                try:
                    return self.engine.extend(tokens, sampling, max_tokens, limits=limits, keep_tokens=kept), len(tokens), None
                except EngineError as error:  # a recurrent memory, for one, has no way back
                    again = str(error)
        pins = self.pinned
        try:
            stream = self.engine.generate(
                whole, sampling, max_tokens, limits=limits, room_tokens=self._room(len(whole) + max_tokens),
                keep_thinking=self.keep_thinking,
            )  # fmt: skip
        except BaseException:
            if self._in_cache and self.engine.generation is None:
                self._out_of_cache("the last message could not be begun", pins)
            raise
        return stream, len(whole), again

    def _continuation(self, messages: list[dict[str, str]], whole: list[int]) -> tuple[list[int], int | None, str | None]:
        """(tokens to read, how many tokens of the sequence stay or None for all, why everything must be read again)."""
        if self.engine.room_tokens == 0:
            return [], None, "the last question was not read to its end"
        if self._rewinds:
            kept, window = common_tokens(self.engine.sequence, whole[:-1]), self.model.llama.n_swa
            if window and kept < len(self.engine.sequence):
                return [], None, f"layers with a sliding window of {window} tokens have no way back to an earlier one"
            return whole[kept:], kept, None
        text = following_text(self.model, messages)
        if text is None:
            return [], None, "the chat template writes earlier turns differently now"
        tokens = self.model.llama.tokenize(text, add_special=False, parse_special=True)
        position, trained = len(self.engine.sequence) + len(tokens), self.model.llama.n_ctx_train
        if position > (trained if self.keep_thinking else trained // 2) and 2 * len(whole) <= position:
            return [], None, f"{position} of the {trained} positions that the model was trained on are used, mostly by old thinking"
        return tokens, None, None

    def _room(self, needed_tokens: int) -> int:
        """How long the sequence may become before it is read again. Under ``full`` this many cells are allocated."""
        trained = self.model.llama.n_ctx_train
        if self.engine.policy.unit == "all":
            return max(needed_tokens, min(4 * needed_tokens, trained))
        return max(trained, 2 * needed_tokens)

    def _ended(self, text: str, done: Finished, read_tokens: int) -> None:
        self._retries = 0
        if self.engine.room_tokens == 0:  # stopped before its question was read
            self.again = "the last question was not read to its end"
            return
        self.turns.append(Turn(
            text, done.content, done.reasoning, done.reason, read_tokens, done.completion_tokens, done.reasoning_tokens,
            done.prefill_seconds, done.decode_seconds, done.thinking_cut,
        ))  # fmt: skip
        self._in_cache, self._beside, self.again = True, None, None


def _pins_of(blocks: tuple[int, ...]) -> str:
    names = ", ".join(map(str, blocks))
    return f"the pin of block {names} is" if len(blocks) == 1 else f"the pins of blocks {names} are"


def following_text(model: Model, messages: list[dict[str, str]]) -> str | None:
    """What the template writes behind the last answer when the newest message, a question, is added, up to the reply.

    ``messages`` end with an answer and that question. None if the template does not go on from its own text: if it
    writes what comes before the answer differently now that there is another turn, or does not write the answer once.
    The beginning of a reply may differ (templates open thinking in the newest turn, and leave it out of older ones or write its
    end alone), and so may white space in front of it.
    """
    answer = {"role": "assistant", "content": MARK}
    try:
        marked = model.render([*messages[:-2], answer, messages[-1]])
        before_it = model.render(messages[:-2])
    except ZoomrError:
        return None
    if marked.count(MARK) != 1:
        return None
    before, after = marked.split(MARK)
    one, other = without_thinking_marks(model, before), without_thinking_marks(model, before_it)
    return after if one.startswith(other) or other.startswith(one) else None


def without_thinking_marks(model: Model, text: str) -> str:
    """``text`` without the white space and the thinking markers that it ends in."""
    ids = (model.markers.think_open, model.markers.think_close)
    marks = [model.llama.piece(i, special=True).decode("utf-8", "replace") for i in ids if i is not None]
    while (rest := next((text.rstrip().removesuffix(mark) for mark in marks if mark and text.rstrip().endswith(mark)), None)) is not None:
        text = rest
    return text.rstrip()


def common_tokens(one: Any, other: Any) -> int:
    """How many tokens both sequences begin with."""
    for i, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return i
    return min(len(one), len(other))
