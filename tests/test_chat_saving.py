"""Where a conversation is saved, under which name and when; and what is said, saved and returned where it cannot be."""

from __future__ import annotations

import json
import os
import signal

import pytest
from chats import ANSWER, Chat
from talk import talking
from test_chat_pipe import piped as piped  # the fixture

from zoomr_cli.chat_loop import NOTHING, TEXT
from zoomr_cli.chat_store import ChatStore
from zoomr_cli.chat_view import ReplyView
from zoomr_local import session, session_files
from zoomr_local.errors import EngineError, SessionError, UnsupportedModel
from zoomr_local.events import PromptProgress


def told(chat, name) -> list[str]:
    """The questions that are saved under ``name``."""
    return [turn["user"] for turn in note(chat.loop.store, name)["turns"]]


def note(store, name) -> dict:
    return json.loads((store.path(name) / "session.json").read_text())["note"]["conversation"]


def full_disk(monkeypatch, most_bytes=0):
    """No file of more than ``most_bytes`` can be written."""
    written = {}

    def write(file, data):
        written[file] = written.get(file, 0) + len(data)
        if written[file] > most_bytes:
            written.pop(file)
            raise OSError(28, "No space left on device")
        return os.write(file, data)

    monkeypatch.setattr(session_files, "write", write)


# ---------------------------------------------------------------- under which name


def test_after_clear_the_next_conversation_is_a_new_one_and_the_loaded_one_stays_as_it_was(chat):
    chat.loop.name = "last"
    chat.type("one", "/save kept", "/clear", "/load kept", "two")
    assert told(chat, "kept") == ["one", "two"], "what was loaded is gone on with"
    text = chat.type("/clear", "/system Be brief.", "three", "/undo", "four")
    assert "kept stays as it was saved: /load kept goes on with it" in text
    assert told(chat, "kept") == ["one", "two"] and note(chat.loop.store, "kept")["system"] is None
    assert told(chat, "last") == ["four"] and note(chat.loop.store, "last")["system"] == "Be brief."
    chat.type("/load kept", "five")
    assert told(chat, "kept") == ["one", "two", "five"] and told(chat, "last") == ["four"]


def test_a_name_under_which_nothing_is_saved_yet_stays_the_name(chat):
    chat.loop.name = "mine"
    chat.type("/clear", "one")
    assert told(chat, "mine") == ["one"] and chat.loop.name == "mine"


def test_a_cleared_conversation_is_not_saved_anywhere_until_something_is_said(chat):
    chat.loop.name = "last"
    text = chat.type("one", "/clear", "/system Be brief.")
    assert "until your next message takes its place, /load last brings it back" in text
    assert told(chat, "last") == ["one"] and note(chat.loop.store, "last")["system"] is None
    assert "/load" not in chat.type("one", "/undo", "/clear"), "there is nothing to bring back"
    assert "holds another conversation" in chat.type("two", "/save kept", "/clear", "three", "/save kept")


def test_what_another_chat_has_saved_meanwhile_is_left_and_that_is_said(chat, tmp_path):
    with talking(budget=192) as engine:
        other = Chat(engine, tmp_path)
        chat.loop.name = other.loop.name = "last"
        chat.type("one")
        other.type("two")
        assert told(chat, "last") == ["two"], "a new conversation takes the place of `last`"
        text = chat.type("three", "four")
        assert text.count("holds what another chat has saved there meanwhile, which is left as it is; /export FILE") == 1
        assert "what was said last is kept nowhere" in text and told(chat, "last") == ["two"]
        other.type("five")
        assert told(chat, "last") == ["two", "five"]
        assert "saved: " in chat.type("/save mine") and told(chat, "mine") == ["one", "three", "four"]
        chat.type("more")
        assert told(chat, "mine")[-1] == "more", "where it could be saved at last it goes on being saved"
        chat.loop.name = other.loop.name = "same"
        other.type("six")
        assert "has saved there meanwhile" in chat.type("seven") and told(chat, "same") == ["two", "five", "six"]
        other.type("/load mine", "eight")
        assert "has saved there meanwhile" in chat.type("/save mine"), "two that go on with one do not lose each other's turns"
    (chat.loop.store.path("mine") / "session.json").unlink()
    assert "saved: " in chat.type("/save mine"), "what was deleted is saved again"


# ---------------------------------------------------------------- when


def test_what_is_taken_back_or_changed_is_saved_at_once(chat):
    chat.loop.name = "last"
    chat.type("one", "two", "/undo")
    assert told(chat, "last") == ["one"]
    chat.type("/system Be brief.")
    assert note(chat.loop.store, "last")["system"] == "Be brief."
    chat.type("/undo")
    assert told(chat, "last") == [], "also the last one that there was"
    chat.type("/clear", "/load last")
    assert chat.loop.talk.system == "Be brief." and ANSWER in chat.type("three") and told(chat, "last") == ["three"]


def test_the_text_alone_can_be_saved_by_name_and_is_taken_up_again(chat):
    chat.loop.name = "last"
    text = chat.type("one", "/system Be brief.", "/save kept")
    assert ", the text alone); to go on with it" in text
    assert "0 turns" not in (text := chat.type("/clear", "/load kept")) and "kept: 1 turn, the last one: one" in text
    assert "the next message reads the conversation again: the system message was changed" in text
    chat.loop.screen.quiet = True
    assert "kept: 1 turn" in chat.type("/load kept"), "a command answers with --quiet too"


def test_a_session_that_is_a_text_is_refused_where_a_cache_is_needed(chat, tmp_path):
    chat.type("one", "/undo", "two", "/system x", f"/save {tmp_path}/s")
    with pytest.raises(SessionError, match="a conversation's text without its cache"):
        session.load(tmp_path / "s")
    assert session.note(tmp_path / "s")["conversation"]["system"] == "x"


# ---------------------------------------------------------------- where it cannot be


def test_where_the_cache_has_no_room_the_text_is_saved_and_that_is_said_once(chat, monkeypatch):
    chat.loop.name = "kept"
    full_disk(monkeypatch, most_bytes=3000)
    text = chat.type("one", "two")
    assert text.count("warning: the text alone is saved in") == 1 and "No space left on device" in text
    assert told(chat, "kept") == ["one", "two"] and chat.loop.failed and chat.loop._failed == TEXT
    monkeypatch.undo()
    chat.type("three")
    assert told(chat, "kept") == ["one", "two", "three"] and not chat.loop.failed
    assert "its cache could not be saved" not in chat.type("/load kept")


def test_where_nothing_can_be_saved_it_says_what_is_left_and_leaving_needs_two_tries(chat, monkeypatch):
    chat.loop.name = "kept"
    chat.type("one")
    full_disk(monkeypatch)
    text = chat.type("two")
    assert "warning: the conversation is not saved: " in text and "the one saved before is whole" in text
    assert "/export FILE writes its text, /save NAME tries another place" in text
    assert text.count("what was said last is kept nowhere") == 1 and "once more leaves" in text, "the second Ctrl-D left"
    assert told(chat, "kept") == ["one"] and chat.loop.failed and chat.loop._failed == NOTHING
    assert chat.type("/exit", "/nothing", "/exit", "/exit", "never").count("kept nowhere") == 2
    asked = chat.type("/load kept", "/stats", "/load kept")
    assert asked.count("/load kept once more drops it") == 2 and len(chat.loop.talk.turns) == 2, "something else came between"
    asked = chat.type("/load kept", "/load kept")
    assert asked.count("/load kept once more drops it") == 1 and "kept: 1 turn," in asked and len(chat.loop.talk.turns) == 1
    chat.type("two")
    monkeypatch.undo()
    assert "kept nowhere" not in chat.type("three") and told(chat, "kept") == ["one", "two", "three"] and not chat.loop.failed


def test_only_what_was_asked_to_be_kept_by_name_is_a_failure(chat, monkeypatch):
    full_disk(monkeypatch)
    chat.loop.name = "last"
    chat.type("one")
    assert not chat.loop.failed, "nobody asked for `last`"
    chat.loop.asked = True  # --continue
    assert chat.loop.failed
    chat.loop.asked, chat.loop.name = False, None
    chat.loop._failed = None
    assert "error: the session could not be saved in" in chat.type("/save mine") and chat.loop.failed
    monkeypatch.undo()
    assert "saved: " in chat.type("/save mine") and not chat.loop.failed


def test_a_save_by_name_that_leaves_the_text_alone_is_a_failure_until_it_is_whole(chat, monkeypatch):
    full_disk(monkeypatch, most_bytes=3000)
    text = chat.type("one", "/save mine")
    assert "warning: the text alone is saved in" in text and chat.loop.failed and told(chat, "mine") == ["one"]
    monkeypatch.undo()
    chat.type("/save mine")
    assert not chat.loop.failed


def test_a_folder_that_cannot_be_made_is_an_error_and_no_traceback(chat, monkeypatch):
    monkeypatch.setattr(chat.loop.store, "make", lambda: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    chat.loop.name = "last"
    text = chat.type("one", "/save mine", "two")
    assert "Permission denied; /export FILE writes the text" in text and text.count(ANSWER) == 2


def test_a_model_whose_cache_cannot_be_saved_keeps_its_conversations_as_text(chat, monkeypatch):
    monkeypatch.setattr(chat.loop.engine, "save", lambda *a: (_ for _ in ()).throw(UnsupportedModel("it is recurrent")))
    chat.loop.name = "kept"
    text = chat.type("one", "two", "/save mine")
    assert text.count("note: the text is saved alone. it is recurrent") == 1 and told(chat, "kept") == told(chat, "mine") == ["one", "two"]
    assert not chat.loop.failed
    assert "reads the conversation again: the model's cache cannot be saved. it is recurrent" in chat.type("/load kept")


def test_a_save_that_was_interrupted_when_all_was_written_is_this_chats_own(chat, monkeypatch):
    chat.loop.name, save = "kept", chat.loop.talk.save

    def interrupted(place, note):
        save(place, note)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chat.loop.talk, "save", interrupted)
        assert "this turn is not saved" in chat.type("one")
    assert "meanwhile" not in chat.type("two") and told(chat, "kept") == ["one", "two"]


def test_a_load_that_was_interrupted_leaves_each_conversation_under_its_own_name(chat, monkeypatch):
    chat.loop.name = "kept"
    chat.type("one", "/clear", "two")
    with monkeypatch.context() as patched:
        patched.setattr(chat.loop.engine, "load", lambda directory: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "interrupted" in chat.type("/load kept")
    assert "reading all" in (text := chat.type("three")) and "loading another conversation broke off" in text
    assert told(chat, "last") == ["two", "three"] and told(chat, "kept") == ["one"]


def test_of_a_conversation_whose_cache_finds_no_cells_the_text_is_taken_up_under_its_name(chat, monkeypatch):
    chat.loop.name = "kept"
    chat.type("one", "/clear", "two")
    with monkeypatch.context() as patched:
        patched.setattr(chat.loop.engine, "load", lambda directory: (_ for _ in ()).throw(EngineError("no memory for the cells")))
        assert "reads the conversation again: no memory for the cells" in chat.type("/load kept")
    chat.type("three")
    assert told(chat, "last") == ["two"] and told(chat, "kept") == ["one", "three"]


@pytest.mark.parametrize("lines", [["hello " * 400], ["/regen"]])
def test_a_message_that_is_stopped_while_it_is_read_leaves_the_save_its_cache(chat, monkeypatch, foreground, lines):
    feed = ReplyView.feed

    def interrupt(view, event):
        feed(view, event)
        if isinstance(event, PromptProgress):
            os.kill(os.getpid(), signal.SIGINT)

    chat.loop.name = "kept"
    chat.type("hello " * 300)
    with monkeypatch.context() as patched:
        patched.setattr(ReplyView, "feed", interrupt)
        text = chat.type(*lines)
    assert "stopped; the message was not read to its end, and the conversation is as it was before it" in text and not chat.loop.talk.has_cache
    assert note(chat.loop.store, "kept")["in_cache"], "it has the same text and a cache that still serves"
    assert "again" not in chat.type("/load kept") and chat.loop.talk.has_cache


def test_a_first_save_that_failed_does_not_make_what_was_there_before_this_chats_own(chat, monkeypatch, tmp_path):
    with talking(budget=192) as engine:
        before = Chat(engine, tmp_path)
        before.loop.name = chat.loop.name = "last"
        before.type("before")
    with monkeypatch.context() as patched:
        full_disk(patched)
        chat.type("one")
    chat.type("/undo", "/clear")
    assert told(chat, "last") == ["before"]


# ---------------------------------------------------------------- a question from a pipe


def test_a_question_that_was_to_be_kept_and_is_not_ends_with_1_and_says_where_its_answer_is(piped, capsys, monkeypatch, tmp_path):
    full_disk(monkeypatch)
    assert piped("hello", "--save", "--session", f"{tmp_path}/mine") == 1
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n" and "warning: the conversation is not saved: " in err and "the answer is on stdout, and nowhere else" in err
    assert piped("hello", "--save") == 0, "nobody asked for it to be kept"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_of_a_question_that_was_to_be_gone_on_with_the_text_is_saved_where_its_cache_has_no_room(piped, capsys, monkeypatch):
    store = ChatStore()
    assert piped("hello", "--save", "--session", "mine") == 0
    with monkeypatch.context() as patched:
        full_disk(patched, most_bytes=3000)
        assert piped("again", "--save", "--session", "mine", "--continue") == 1
    err = capsys.readouterr().err
    assert f"warning: the text alone is saved in {store.path('mine')}" in err
    assert [turn["user"] for turn in note(store, "mine")["turns"]] == ["hello", "again"]
    assert piped("more", "--save", "--session", "mine", "--continue") == 0
    assert "its cache could not be saved" in capsys.readouterr().err


def test_a_damaged_conversation_says_how_to_begin_and_what_else_there_is(piped, capsys):
    assert piped("hello", "--save", "--session", "other") == 0 and piped("hello", "--save", "--session", "mine") == 0
    (ChatStore().path("mine") / "session.json").write_text("{")
    capsys.readouterr()
    assert piped("again", "--session", "mine", "--continue") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("; begin without --continue, or give --session one of other\n") and "/load" not in err
