"""What a conversation that was cleared, taken back or left for another one leaves behind: nothing, in cells, pages, views and saves."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from pathlib import Path

import pytest
from chats import ANSWER, Chat
from talk import GREEDY, NO_LIMITS, UNTHINK, say, talking, thoughts, words

from zoomr_cli.chat_view import ReplyView
from zoomr_local.cache_view import cache_state
from zoomr_local.conversation import Conversation
from zoomr_local.errors import EngineError, SessionError
from zoomr_local.events import PrefilledAgain, PromptProgress

LONG = ["hello " * 30] * 5
LOOKS = {"/kv": "nothing is in the cache", "/notes": "there are no summaries", "/zoom 0": "there are no blocks", "/pin 0": "there are no blocks"}


@pytest.fixture
def paged(tmp_path):
    """A chat whose pages are on disk, and the folder they are in."""
    with talking(budget=192, ram=0, kv_disk=1 << 24, kv_dir=tmp_path / "pages", wait_for_disk=True) as engine:
        yield Chat(engine, tmp_path), tmp_path / "pages"


def pages(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size and path.name not in ("CACHEDIR.TAG", "lock")]


def saved(chat, name) -> dict:
    return json.loads((chat.loop.store.path(name) / "session.json").read_text())


def empty(chat, *words_of):
    """Nothing of the conversation can be seen, and what is asked for is answered by ``words_of``."""
    engine = chat.loop.engine
    assert engine.generation is None and not engine.context.cells and not engine.store.keys() and not len(engine.sequence)
    for typed, told in LOOKS.items():
        text = chat.type(typed)
        assert told in text and "w12" not in text and all(word in text for word in words_of), (typed, text)


def test_clear_leaves_no_cell_no_page_and_no_file(paged):
    chat, folder = paged
    folder_was = pages(folder) if folder.exists() else []
    chat.type(*LONG)
    chat.loop.engine.store.settle(wait=True)
    assert len(pages(folder)) > len(folder_was) and chat.loop.engine.context.cells
    chat.type("/clear")
    assert pages(folder) == folder_was
    empty(chat, "yet")
    assert "nothing was said yet" in chat.type("/save x") and "nothing was said yet" in chat.type("/export x.md") and "nothing was said yet" in chat.type("/stats")
    assert ANSWER in chat.type("hello") and len(chat.loop.engine.sequence) < 60


@pytest.mark.parametrize("typed, why", [("/undo", "a turn was taken back"), ("/system Be brief.", "the system message was changed")])
def test_what_was_taken_back_or_changed_is_in_no_cell_and_no_save(chat, typed, why):
    chat.loop.name = "kept"
    chat.type(*LONG, typed)
    empty(chat, why)
    there = saved(chat, "kept")
    assert there["pages"] == [] and there["parts"] == {} and not list(chat.loop.store.path("kept").glob("cells*"))
    assert there["note"]["conversation"]["again"] == why
    assert "reading all" in (text := chat.type("hello")) and why in text
    assert saved(chat, "kept")["parts"] and chat.loop.talk.has_cache


def test_a_conversation_loaded_without_its_cache_has_nothing_of_the_one_before(chat, tmp_path):
    chat.type("one", "/system Be brief.", "/save other", "/clear", "/system -", *LONG)
    assert "the next message reads the conversation again: the system message was changed" in chat.type("/load other")
    empty(chat, "the system message was changed")
    chat.type("/save copy")
    assert saved(chat, "copy")["pages"] == [] and saved(chat, "copy")["note"]["conversation"]["turns"][0]["user"] == "one"
    assert "reading all" in chat.type("two") and [t.user for t in chat.loop.talk.turns] == ["one", "two"]


def test_one_whose_cache_is_refused_or_damaged_leaves_nothing_either(chat):
    chat.type("one", "/save other", "/clear", *LONG)
    cells = next(chat.loop.store.path("other").glob("cells*"))
    cells.write_bytes(cells.read_bytes()[:-1])
    assert "is damaged" in chat.type("/load other")
    empty(chat, "is damaged")


def test_a_page_that_does_not_come_back_leaves_no_half_of_a_conversation(chat, monkeypatch):
    from zoomr_local import session

    chat.type(*LONG, "/save other", "/clear")
    monkeypatch.setattr(session, "_check", lambda *a: (_ for _ in ()).throw(SessionError("it does not fit itself")))
    assert "it does not fit itself" in chat.type("/load other")
    empty(chat)


def test_a_reply_that_broke_off_is_not_in_the_cache_and_what_was_said_before_is_kept(chat, monkeypatch):
    chat.loop.name = "kept"
    chat.type("one")
    decode = chat.loop.engine.context.decode

    def fail(tokens, positions, **more):
        if positions[0] > 70:
            raise EngineError("the device is gone")
        decode(tokens, positions, **more)

    monkeypatch.setattr(chat.loop.engine.context, "decode", fail)
    assert "the device is gone" in chat.type("two")
    empty(chat, "the last reply broke off")
    assert [t["user"] for t in saved(chat, "kept")["note"]["conversation"]["turns"]] == ["one"]
    chat.type("/save mine")
    assert saved(chat, "mine")["pages"] == [] and [t["user"] for t in saved(chat, "mine")["note"]["conversation"]["turns"]] == ["one"]


def test_a_message_that_is_stopped_while_it_is_read_is_no_turn_and_that_is_said(chat, monkeypatch, foreground):
    feed = ReplyView.feed

    def interrupt(view, event):
        feed(view, event)
        if isinstance(event, PromptProgress) and event.total_tokens > 300:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ReplyView, "feed", interrupt)
    text = chat.type("hello " * 400)
    assert "stopped; the message was not read to its end, and the conversation is as it was before it" in text and not chat.loop.talk.turns
    empty(chat, "yet")
    assert "reading all" not in chat.type("one") and "not read to its end" in chat.type("hello " * 400)
    empty(chat, "the last question was not read to its end")
    monkeypatch.undo()
    assert "reading all" in chat.type("two") and [t.user for t in chat.loop.talk.turns] == ["one", "two"]


def test_a_reply_that_nobody_waits_for_takes_nothing_from_the_next_one(chat):
    """Python's events of a turn may be dropped at any time, also after another turn has begun."""
    from scripted import ScriptedSampler

    talk, ScriptedSampler.script = chat.loop.talk, [UNTHINK, *words(20)]
    first = talk.send("one", GREEDY, 30, NO_LIMITS)
    next(first)
    second = talk.send("two", GREEDY, 30, NO_LIMITS)
    next(second)
    first.close()
    assert [*second][-1].reason == "stop" and talk.has_cache


def test_under_full_what_was_taken_back_is_not_saved_and_what_stays_is_not_read_again(tmp_path):
    with talking("full", 4096) as engine:
        talk = Conversation(engine.model, engine)
        for n in (10, 11):
            say(talk, words(n), [*thoughts(20), UNTHINK, *words(6)])
        talk.undo()
        assert not talk.has_cache
        talk.save(tmp_path / "s")
        there = json.loads((tmp_path / "s" / "session.json").read_text())
        assert there["parts"] == {} and len(there["note"]["conversation"]["turns"]) == 1
        events = say(talk, words(12), [UNTHINK, *words(6)])
        assert not any(isinstance(e, PrefilledAgain) for e in events) and talk.has_cache and events[-1].prompt_tokens
        with pytest.raises(SessionError, match="text without its cache"):
            engine.load(tmp_path / "s")
        talk.load(tmp_path / "s")
        assert talk.again == "a turn was taken back" and engine.generation is None


def test_under_full_an_edit_that_is_refused_leaves_the_cache_to_be_saved():
    with talking("full", 4096) as engine:
        talk = Conversation(engine.model, engine)
        say(talk, words(10), [*thoughts(20), UNTHINK, *words(6)])
        render, engine.model.render = engine.model.render, lambda messages: (_ for _ in ()).throw(EngineError("no"))
        with pytest.raises(EngineError):
            next(talk.ask_instead("x", GREEDY, 5))
        engine.model.render = render
        assert talk.has_cache and len(talk.turns) == 1


@pytest.mark.parametrize("lines", [["/clear"], ["/undo"], ["/system Be brief."], ["/load other"]])
def test_nothing_holds_on_to_what_was_said_once_it_is_out_of_the_cache(chat, lines):
    chat.type("other", "/save other", "/clear", "one")
    held = weakref.ref(chat.loop.engine.generation)
    chat.type(*lines)
    gc.collect()
    assert held() is None


def test_the_same_system_message_changes_nothing(chat):
    chat.type("/system Be brief.", "one", "/system Be brief.")
    assert chat.loop.talk.has_cache and "reading all" not in chat.type("two")


def test_another_model_leaves_nothing_in_the_engine_of_the_one_before(chat):
    chat.type(*LONG)
    before = chat.loop.engine
    with talking(budget=192) as other:
        chat.loop.talk.change_model(other.model, other)
        assert before.generation is None and not before.context.cells and not before.store.keys()
        assert "reads the conversation again (the model was changed)" in chat.type("/kv") and cache_state(other) is None
