"""A turn that cannot be begun, as its text needs more than there is: the ones after it are answered, on what was said before."""

from __future__ import annotations

import pytest
from scripted import BookContext, ScriptedSampler
from talk import GREEDY, NO_LIMITS, UNTHINK, BookEngine, of, say, spoken, talking, thoughts, words

from zoomr_local.conversation import Conversation
from zoomr_local.errors import EngineError, TierSizeError
from zoomr_local.events import Finished, PrefilledAgain, Warned

SCRIPT = [*thoughts(60, 60, 60), UNTHINK, *words(9)]


def test_what_was_pinned_is_said_to_be_gone(monkeypatch):
    with talking() as engine:
        talk = Conversation(engine.model, engine)
        say(talk, words(30), SCRIPT)
        say(talk, words(30), SCRIPT)
        block = next(b.number for b in engine.generation.timeline.blocks if b.kind == "answer")
        talk.pin(block)
        with monkeypatch.context() as patch:
            patch.setattr("zoomr_local.tiers.arena.Arena.begin", no_memory)
            with pytest.raises(TierSizeError):
                list(talk.send(spoken(words(40)), GREEDY, 100_000, NO_LIMITS))
        assert talk.pinned == (block,)
        events = say(talk, words(30), SCRIPT)
        assert any(f"block {block} is gone" in e.message for e in of(Warned, events)) and talk.pinned == ()


@pytest.mark.parametrize("keep", [True, False])
def test_tiers_that_a_long_turn_would_need(keep, monkeypatch):
    """The next turn reads everything again, and says so: the pages of before are gone, so nothing may go on with them."""
    with talking() as engine:
        talk = Conversation(engine.model, engine, keep_thinking=keep)
        assert say(talk, words(30), SCRIPT)[-1].cache.page_outs
        with monkeypatch.context() as patch:
            patch.setattr("zoomr_local.tiers.arena.Arena.begin", no_memory)
            with pytest.raises(TierSizeError, match="no memory"):
                list(talk.send(spoken(words(40)), GREEDY, 100_000, NO_LIMITS))
        assert len(talk.turns) == 1 and engine.generation is None and not len(engine.store.keys())
        events = say(talk, words(30), SCRIPT)
        (again,) = of(PrefilledAgain, events)
        assert "could not be begun" in again.reason and isinstance(events[-1], Finished) and len(talk.turns) == 2
        assert not events[-1].cache.lost_blocks


def no_memory(arena, n_bytes):
    raise TierSizeError("no memory")


class Small(BookEngine):
    """Cells for 5,000 tokens at most."""

    def _new_context(self, n_tokens):
        if n_tokens > 5000:
            raise EngineError("no memory for so many cells")
        return BookContext(n_tokens)


def test_cells_that_a_long_turn_would_need_under_full(monkeypatch):
    monkeypatch.setattr("talk.BookEngine", Small)
    with talking("full") as engine:
        talk = Conversation(engine.model, engine)
        say(talk, words(30), SCRIPT)
        for _ in range(2):
            with pytest.raises(EngineError, match="no memory for so many cells"):
                list(talk.send(spoken(words(40)), GREEDY, 9000, NO_LIMITS))
        events = say(talk, words(30), SCRIPT)
        assert of(PrefilledAgain, events) and events[-1].reason == "stop" and len(talk.turns) == 2


def test_a_request_too_long_for_full_leaves_the_shorter_ones_after_it(monkeypatch):
    monkeypatch.setattr("talk.BookEngine", Small)
    with talking("full") as engine:
        for max_tokens in (900, 9000, 100, 2000):
            ScriptedSampler.script = words(9)
            if max_tokens == 9000:
                with pytest.raises(EngineError, match="no memory for so many cells"):
                    engine.generate(words(9), GREEDY, max_tokens)
            else:
                assert list(engine.generate(words(9), GREEDY, max_tokens))[-1].reason == "stop"
