"""`zoomr chat` as a user meets it, on scripted text: what is drawn, and what the commands do.

The engine is the real one on a context that keeps books (talk.py). A real terminal: test_chat_terminal.py; a question
from a pipe: test_chat_pipe.py; the cache: test_chat_cache.py."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest
from chats import ANSWER, Terminal
from talk import CLOSE, OPEN, UNTHINK, words

from zoomr_cli.chat_commands import Commands
from zoomr_cli.chat_input import LineEditor, is_open, unquoted
from zoomr_cli.chat_store import ChatStore
from zoomr_cli.chat_view import ReplyView, Screen, visible
from zoomr_local.errors import UsageError
from zoomr_local.events import TokenDecoded
from zoomr_local.sampling import SamplingParams
from zoomr_local.session import Saved

# ---------------------------------------------------------------- a conversation


def test_an_answer_is_plain_and_thinking_is_folded_into_a_line(chat):
    text = chat.type("hello")
    assert ANSWER.lstrip("\n") in text and "w41" not in text
    assert "thought 35 tokens · " in text and "KV " in text and "/192" in text and "1 block" in text
    assert [t.user for t in chat.loop.talk.turns] == ["hello"]
    assert chat.type("again").endswith(ANSWER + "\n") and len(chat.loop.talk.turns) == 2


def test_thinking_can_be_shown_or_hidden(chat):
    assert "w41" in chat.type("/think show", "hello")
    assert "thought" not in chat.type("/think hide", "hello")


def test_thoughts_and_summaries_that_are_shown_begin_lines_of_their_own(chat):
    one, two = [*words(3), OPEN, *words(2), CLOSE], [*words(4), OPEN, *words(3), CLOSE]
    text = chat.type("/think show", "hello", reply=[*one, *two, *words(2), UNTHINK, *words(3)])
    lines = text.splitlines()
    assert lines[1:6] == [" w12 w13 w14", "summary: w12 w13", "w12 w13 w14 w15", "summary: w12 w13 w14", "w12 w13"]
    assert lines[6].startswith("thought 14 tokens") and lines[7] == " w12 w13 w14"
    reasoning = chat.loop.talk.turns[0].reasoning
    assert "w14<|begin_of_summary|> w12 w13<|end_of_summary|> w12" in reasoning, "the record keeps what the model wrote"


def test_ctrl_c_stops_the_reply_and_keeps_it(chat, monkeypatch, foreground):
    feed = ReplyView.feed

    def interrupt(view, event):
        feed(view, event)
        if isinstance(event, TokenDecoded) and event.position == 60:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ReplyView, "feed", interrupt)
    text = chat.type("hello", reply=[UNTHINK, *words(100)])
    assert "stopped; what was written is kept" in text and "no answer" not in text
    (turn,) = chat.loop.talk.turns
    assert turn.reason == "cancelled" and 50 <= turn.completion_tokens <= 60 and turn.answer.startswith(" w12")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_the_system_refuses_is_said_and_ends_no_chat(chat, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "/locked/x")

    chat.loop.models = type("Models", (), {"change": refused, "recorder": None})()
    monkeypatch.setattr(Commands, "do_save", refused)
    text = chat.type("hello", "/save ./locked/x", "/model ./locked/x.gguf", "again")
    assert text.count("error: /locked/x: Permission denied") == 2 and "Permission denied; " in text and "stays" in text
    assert [turn.user for turn in chat.loop.talk.turns] == ["hello", "again"]


def test_a_file_whose_name_has_spaces_can_be_read_with_a_question(chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my file.txt").write_text("w77")
    chat.type("/read my file.txt what is it")
    assert chat.loop.talk.turns[0].user == "w77\n\nwhat is it"
    assert "cannot read my: No such file" in chat.type("/read my fil.txt")


def test_an_export_that_the_disk_has_no_room_for_leaves_no_file(chat, tmp_path, monkeypatch):
    chat.type("hello")
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **more: opened(path, mode, **more) if mode != "x" else full(path))

    def full(path):
        path.touch()
        file = io.StringIO()
        file.write = lambda text: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        return file

    assert "No space left on device" in chat.type(f"/export {tmp_path / 'e.md'}") and not (tmp_path / "e.md").exists()


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_an_error_does_not_end_the_chat(chat):
    text = chat.type(KeyboardInterrupt(), "/nothing", "hello")
    assert "Ctrl-D or /exit leaves" in text and "error: there is no command /nothing" in text and ANSWER in text


@pytest.mark.parametrize("stop", ["23 and more", "w22 w23, or"])
def test_text_that_might_have_begun_a_stop_string_is_shown_when_it_has_not(chat, stop):
    chat.loop.sampling = SamplingParams(stop=(stop,))
    text = chat.type("hello", "again")
    assert text.count(ANSWER.strip() + "\n") == 2
    assert [turn.answer for turn in chat.loop.talk.turns] == [ANSWER] * 2


def test_what_happens_is_said(chat):
    text = chat.type("/think 10", "hello", "/undo", "hello", "hello " * 500, "/exit", "never", reply=[*words(60), *words(9)])
    assert "thinking ended after 10 tokens: it reached --think-budget" in text
    assert text.count("the model gave no answer") == 0 and "never" not in text
    assert "taken back: hello" in text and "read in pieces" in text and "reading all" not in text
    chat.loop.think_budget = "off"
    assert "reading all" in chat.type("hello", "/system Be brief.", "hello")
    assert "the model gave no answer" in chat.type("hello", reply=[UNTHINK])


def test_a_slash_after_a_space_is_a_message(chat):
    chat.type(" /etc/passwd is a file", '"""\n/help\n"""')
    assert [t.user for t in chat.loop.talk.turns] == ["/etc/passwd is a file", "/help"]


# ---------------------------------------------------------------- commands


def test_unknown_commands_are_answered_with_the_nearest(chat):
    for typed, meant in (("/hlp", "/help"), ("/stat", "/stats"), ("/quit", "/exit"), ("/xyzzy", "/help lists"), ("/kvv", "/kv"), ("/unpn", "/unpin"), ("/modle", "/model"), ("/edt", "/edit")):
        assert meant in chat.type(typed)


def test_tab_completes_commands_and_the_names_they_take():
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document
    from prompt_toolkit.output import DummyOutput

    found = Commands.completions(["kept", "last"], ["zoomr-tiny"])
    with create_app_session(output=DummyOutput()):
        completer = LineEditor(lambda: found, None)._session.completer
    for typed, meant in (
        ("/unp", {"/unpin"}), ("/pi", {"/pin"}), ("/load k", {"/load kept"}), ("/ed", {"/edit"}), ("what /ed", set()),
        ("/model ", {"/model zoomr-tiny"}), ("/help unp", {"/help unpin"}),
    ):  # fmt: skip
        assert {c.text for c in completer.get_completions(Document(typed), CompleteEvent())} == meant


def test_help_names_every_command_and_each_has_help(chat):
    text = chat.type("/help")
    for name in Commands.names():
        assert name in text and chat.type(f"/help {name}").startswith(name)
    assert {"/help", "/exit", "/clear", "/undo", "/regen", "/system", "/save", "/load", "/stats", "/kv", "/notes", "/set", "/think", "/zoom", "/pin", "/unpin", "/edit", "/model"} <= set(Commands.names())


def test_stats_add_up(chat):
    assert "nothing was said yet" in chat.type("/stats")
    chat.type("hello", "again")
    text = chat.type("/stats")
    turns = chat.loop.talk.turns
    assert f"all turns  2: {sum(t.prompt_tokens for t in turns)} tokens read, {sum(t.completion_tokens for t in turns)} written, 70 of them thinking" in text
    assert "of 192 cells at the peak" in text and "policy zoomr" in text and "dropped" in text


def test_set_changes_sampling_and_refuses_what_cannot_be(chat):
    assert chat.type("/set temp") == "temp 0.0\n" and chat.type("/set temp ") == "temp 0.0\n" and chat.type("/set max_tokens") == "max_tokens 200\n"
    text = chat.type("/set temp 0.5", "/set top_k 7", "/set max_tokens 3", "hello")
    assert "temp 0.5" in text and "top_k 7" in text and "cut off: --max-tokens" in text
    assert (chat.loop.sampling.temperature, chat.loop.sampling.top_k, chat.loop.max_tokens) == (0.5, 7, 3)
    for typed in ("/set temp warm", "/set temp -1", "/set colour 3", "/set colour", "/set max_tokens 0", "/set top_k 1.5", "/set top_k 4294967297", "/set repeat_last_n 4294967297"):
        assert "error: " in chat.type(typed), typed
    assert (chat.loop.sampling.temperature, chat.loop.max_tokens) == (0.5, 3)


def test_undo_regen_clear_and_system(chat):
    assert "no turn to take back" in chat.type("/undo") and "no reply to write again" in chat.type("/regen")
    chat.type("one", "two", "/regen")
    assert [t.user for t in chat.loop.talk.turns] == ["one", "two"] and chat.loop.engine.generation.sampling.seed == 1
    chat.type("/undo", "/system Be brief.", "three")
    assert [m["content"] for m in chat.loop.talk.messages][:2] == ["Be brief.", "one"]
    assert "system: (none)" in chat.type("/system -")
    chat.type("/clear")
    assert chat.loop.talk.turns == []


def test_clear_says_how_a_saved_conversation_comes_back_until_it_is_replaced(chat):
    assert "/load" not in chat.type("hello", "/clear")
    chat.loop.name = "kept"
    assert "kept stays as it was saved: /load kept goes on with it" in chat.type("hello", "/clear")
    chat.type("/load kept")
    assert [t.user for t in chat.loop.talk.turns] == ["hello"]


def test_files_are_read_and_written_never_over(chat, tmp_path):
    (tmp_path / "f.txt").write_text("three words here")
    chat.type(f"/read {tmp_path}/f.txt What is it?")
    assert chat.loop.talk.turns[0].user == "three words here\n\nWhat is it?"
    assert "cannot read" in chat.type("/read /nowhere/f.txt")
    chat.type(f"/export {tmp_path}/out.md", f"/export {tmp_path}/out.json")
    assert "three words here" in (tmp_path / "out.md").read_text() and ANSWER.strip() in (tmp_path / "out.md").read_text()
    assert json.loads((tmp_path / "out.json").read_text())["turns"][0]["answer"] == ANSWER
    assert "cannot write" in chat.type(f"/export {tmp_path}/out.md")


def test_what_cannot_be_is_said_and_the_chat_goes_on(chat, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    chat.type("hello")
    for typed, message in (
        ("/read ~nobody-here/f", "home folder in ~nobody-here/f is not known"), ("/export ~nobody-here/f", "is not known"),
        ("/save ~nobody-here/f", "is not known"), ("/read a\0b", "null character"), ("/export a\0b", "null character"),
        ("/load x/a\0b", "null character"), ("/zoom \u00b2", "a block's number"), ("/zoom " + "9" * 5000, "a block's number"),
        ("/think \u00b2", "give a number"), ("/think " + "9" * 5000, "give a number"), (f"/read {tmp_path}/empty.txt", "is empty"),
        ("/", "/help lists them. A message"), ("/ kv", "no command /;"),
    ):  # fmt: skip
        assert message in chat.type(typed), typed
    assert "P pinned" in chat.type("/kv\tall") and len(chat.loop.talk.turns) == 1


def test_text_of_others_does_not_obey_the_terminal(chat, monkeypatch):
    monkeypatch.setattr(chat.loop.talk, "load", lambda place: {})
    assert "the last one: [2Jred" in chat.type("\x1b[2Jred", "/load kept")
    assert "taken back: [2Jred" in chat.type("/undo")


def test_another_conversation_is_never_saved_over(chat, monkeypatch):
    saved = []

    def save(place, note):
        place.mkdir(parents=True, exist_ok=True)
        (place / "session.json").write_text("{}")
        saved.append(place.name)
        return Saved(place, 1, 1, 0.0)

    monkeypatch.setattr(chat.loop.talk, "save", save)
    save(chat.loop.store.path("kept"), {})
    assert "kept holds another conversation" in chat.type("hello", "/save kept") and saved == ["kept"]
    assert "holds another" not in chat.type("/save mine", "/save mine") and saved[1:] == ["mine", "mine"]
    monkeypatch.setattr(chat.loop.talk, "load", lambda place: {})
    chat.loop.name = "last"
    assert "holds another" not in chat.type("/load kept", "/save kept") and "holds another" in chat.type("/save mine")
    chat.type("two")
    assert saved[3:] == ["kept", "kept"], "what was loaded goes on being saved where it is, and `last` stays as it was"


def test_a_save_that_is_interrupted_is_said(chat, monkeypatch):
    chat.loop.name = "last"
    monkeypatch.setattr(chat.loop.talk, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    text = chat.type("one")
    assert "this turn is not saved; /save NAME" in text and "interrupted" in text and len(chat.loop.talk.turns) == 1


def test_load_lists_and_names_are_checked(chat):
    assert "nothing is saved" in chat.type("/load")
    assert "no session in" in chat.type("/load nothing") and "is no name" in chat.type("/save a b")
    assert "nothing was said yet" in chat.type("/save one")


def test_a_save_that_fails_is_said_once_and_the_chat_goes_on(chat, monkeypatch):
    chat.loop.name = "last"
    for name in ("save", "save_text"):
        monkeypatch.setattr(chat.loop.talk, name, lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    text = chat.type("one", "two")
    assert text.count("is not saved") == 1 and "/export FILE writes its text" in text and len(chat.loop.talk.turns) == 2


# ---------------------------------------------------------------- small things


def test_control_characters_of_the_model_do_not_reach_the_terminal():
    assert visible("a\x1b[2Jb\x07\tc\nd\x9b1m\x7f\re") == "a[2Jb\tc\nd1me"
    out, pipe = Terminal(), io.StringIO()
    Screen(out=out, err=out, styled=False).answer("a\x1b[2J")
    Screen(out=pipe, err=out, styled=False).answer("a\x1b[2J")
    assert out.getvalue() == "a[2J" and pipe.getvalue() == "a\x1b[2J", "a file gets the bytes as they are"


def test_the_live_line_fits_and_goes_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    screen = Screen(out=out, err=out, styled=False)
    screen.status("x" * 100)
    assert out.getvalue() == "x" * 39
    screen.answer("hi")
    assert out.getvalue().endswith("\r\x1b[Khi")
    screen.status("never in the middle of a line", force=True)
    assert out.getvalue().endswith("hi")
    monkeypatch.setenv("TERM", "dumb")
    assert not Screen(out=out, err=out).live


def test_the_live_line_of_thinking_is_there_with_its_first_token_however_fast_it_goes(chat, monkeypatch):
    screen = chat.loop.screen
    screen.live, screen._drawn = True, 0.0
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    text = chat.type("hello")
    assert text.count("reading ") == 1 and text.count("thinking ") == 1 and "Ctrl-T answers now" in text


def test_blocks_of_lines():
    assert is_open('"""') and is_open('"""a\nb') and not is_open('"""a\nb"""') and not is_open('a """') and is_open('""""')
    assert unquoted('"""\n  a\n\nb\n"""') == "  a\n\nb" and unquoted("  a ") == "a" and unquoted('"""a') == '"""a'


def test_a_message_is_sent_also_if_it_cannot_be_kept_in_the_history(tmp_path, capsys):
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        editor = LineEditor(Commands.names(), tmp_path / "history")
        for text in ("one", "two", "three"):
            keys.send_text(text + "\r")
            assert editor.ask() == text
            if text == "one":
                assert "+one" in (tmp_path / "history").read_text()
                (tmp_path / "history").unlink()
                (tmp_path / "history").mkdir()  # as a full disk: it cannot be written any more
    assert capsys.readouterr().err.count("what is typed is not kept in") == 1


def test_the_store_is_private_and_the_newest_comes_first(tmp_path):
    store = ChatStore(tmp_path / "state")
    store.make()
    assert (store.base.stat().st_mode & 0o777, (store.base / "chats").stat().st_mode & 0o777) == (0o700, 0o700)
    assert store.private_history().stat().st_mode & 0o777 == 0o600
    for at, name in enumerate(("a", "b", "c")):
        store.path(name).mkdir()
        (store.path(name) / "session.json").write_text("{}")
        os.utime(store.path(name) / "session.json", (at, at))
    assert store.names() == ["c", "b", "a"] and store.path("./x") == Path("x")
    for name in ("", "a b", "-x", "x" * 80, "a\nb"):
        with pytest.raises(UsageError):
            store.path(name)
