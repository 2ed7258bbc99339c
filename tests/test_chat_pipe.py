"""`zoomr chat` with a question on stdin, and what it refuses: one answer, one JSON object, one line of error."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from contextlib import contextmanager

import pytest
from chats import ANSWER, REPLY, Terminal
from scripted import ScriptedSampler
from talk import UNTHINK, talking

from zoomr_cli.chat_view import ReplyView, Screen
from zoomr_cli.main import main
from zoomr_local.events import TokenDecoded

@pytest.fixture
def piped(monkeypatch, tmp_path):
    """Runs `zoomr chat` on a scripted engine with text on stdin."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("ZOOMR_MODEL", "")
    monkeypatch.delenv("ZOOMR_DEBUG", raising=False)
    with talking(budget=192) as engine:

        @contextmanager
        def open_engine(model_file, config, n_gpu_layers):
            engine.asked = config
            yield engine.model, engine

        monkeypatch.setattr("zoomr_cli.solve.open_engine", open_engine)

        def run(text, *arguments, reply=REPLY):
            ScriptedSampler.script = reply
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode())))
            return main(["chat", *([] if "--save" in arguments else ["--no-save"]), *arguments])

        yield run


def test_one_question_from_a_pipe(piped, capsys):
    assert piped("hello\n") == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n" and "thought 35 tokens" in err
    assert piped("hello\n", "-q") == 0
    assert capsys.readouterr() == (ANSWER + "\n", "")


def test_one_question_as_an_argument_leaves_stdin_alone(piped, capsys):
    assert piped("somebody else's\n", " hello ") == 0
    assert capsys.readouterr().out == ANSWER + "\n" and sys.stdin.read() == "somebody else's\n"
    assert piped("", "--json", "h\udcffi") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["answer"] == ANSWER and "warning: the question is not UTF-8 from byte 1 on" in err
    assert piped("x", " ") == 2 and "the question is empty" in capsys.readouterr().err


def test_json_is_one_object_with_everything(piped, capsys):
    assert piped("hello", "--json", "--think-budget", "20") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["thinking_cut"] == "budget" and record["answer"].strip() and record["usage"]["reasoning_tokens"] > 20
    assert piped("hello", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["answer"] == ANSWER and record["finish_reason"] == "stop" and record["kv"]["budget"] == 192
    assert record["usage"]["reasoning_tokens"] == 35 and record["thinking_cut"] is None


def test_what_is_not_utf_8_is_replaced_and_said(piped, capsys, chat, tmp_path):
    assert piped(b"h\xffi \n", "-q") == 0
    assert "warning: stdin is not UTF-8 from byte 1 on" in capsys.readouterr().err
    assert piped("h\u00e9llo", "-q") == 0 and capsys.readouterr().err == ""
    (tmp_path / "f").write_bytes(b"\x00\xfe")
    assert f"{tmp_path}/f is not UTF-8" in chat.type(f"/read {tmp_path}/f")
    assert chat.loop.talk.turns[0].user == "\x00\ufffd"


def test_one_question_is_saved_only_where_it_was_asked_to_be(piped, tmp_path, monkeypatch):
    from zoomr_cli.chat_store import ChatStore
    from zoomr_local.conversation import Conversation

    saved = []
    monkeypatch.setattr(Conversation, "save", lambda talk, place, note: saved.append((place.name, len(talk.turns))))
    assert piped("hello", "--save") == 0 and saved == [], "`last` is a conversation of somebody at a terminal"
    assert piped("hello", "--save", "--session", f"{tmp_path}/mine") == 0 and saved == [("mine", 1)]
    last = ChatStore().path("last")
    last.mkdir(parents=True)
    (last / "session.json").write_text("{}")
    monkeypatch.setattr(Conversation, "load", lambda talk, place: {})
    assert piped("hello", "--save") == 0 and len(saved) == 1
    assert piped("hello", "--save", "--continue") == 0 and saved[1:] == [("last", 1)], "what is gone on with is saved"


def test_no_answer_is_a_failure(piped, capsys):
    assert piped("hello", reply=[UNTHINK]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "the model gave no answer" in err


@pytest.mark.parametrize("text, arguments, message", [
    ("", (), "no question on stdin"), ("x", ("--think-budget", "much"), "--think-budget much"), ("x", ("--thinking", "loud"), "choose fold, show or hide"),
    ("x", ("--continue",), "no conversation is saved"), ("x", ("--policy", "zoom"), "did you mean zoomr"), ("x", ("--session", "a b"), "is no name"),
    ("x", ("--policy", "breadcrumbs"), "has no conversations"),
])  # fmt: skip
def test_wrong_use_is_one_line_and_exit_code_2(piped, capsys, text, arguments, message):
    assert piped(text, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


def test_sigterm_stops_a_single_reply_and_saves_it(piped, capsys, monkeypatch, tmp_path):
    from zoomr_local.conversation import Conversation
    from zoomr_local.engine import Engine

    def told(engine, *arguments, made=Engine._new_generation):
        os.kill(os.getpid(), signal.SIGTERM)
        return made(engine, *arguments)

    saved = []
    monkeypatch.setattr(Conversation, "save", lambda talk, place, note: saved.append([turn.reason for turn in talk.turns]))
    monkeypatch.setattr(Engine, "_new_generation", told)
    before = signal.getsignal(signal.SIGTERM)
    assert piped("hello\n", "--save", "--session", f"{tmp_path}/mine", "--json") == 130
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "cancelled"
    assert saved == [["cancelled"]] and signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_before_there_is_a_generation_is_not_lost(piped, capsys, monkeypatch):
    from zoomr_local.engine import Engine

    def interrupted(engine, *arguments, made=Engine._new_generation):
        os.kill(os.getpid(), signal.SIGINT)
        return made(engine, *arguments)

    monkeypatch.setattr(Engine, "_new_generation", interrupted)
    assert piped("hello\n") == 130
    out, err = capsys.readouterr()
    assert out == "" and "stopped" in err


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_closed_stream_is_said(monkeypatch, capsys, name):
    monkeypatch.setattr(f"sys.{name}", None)
    assert main(["chat", "--no-save"]) == 2
    assert "stdin or stdout is closed" in capsys.readouterr().err


def test_a_closed_stderr_is_no_error(piped, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert piped("hello") == 0 and capsys.readouterr().out == ANSWER + "\n"


def test_thinking_that_is_shown_ends_its_line_in_a_pipe_too(piped, capsys):
    assert piped("hello", "--thinking", "show") == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n" and any(line.startswith("thought ") for line in err.splitlines())


def test_no_home_folder_is_said(monkeypatch, capsys):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert main(["chat", "--continue"]) == 2
    assert "set HOME, or XDG_STATE_HOME" in capsys.readouterr().err


def test_a_question_whose_answer_is_not_kept_needs_no_home_folder(piped, monkeypatch, capsys):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert piped("hello") == 0 and capsys.readouterr().out.strip() == ANSWER.strip()


def test_a_name_that_holds_a_conversation_is_gone_on_with_or_refused(piped, capsys, tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "session.json").write_text("kept")
    assert main(["chat", "--session", f"{place}/"]) == 2
    assert "go on with it by --continue" in capsys.readouterr().err and (place / "session.json").read_text() == "kept"


def test_a_name_that_nothing_would_be_saved_under_is_refused(piped, capsys, tmp_path, monkeypatch):
    assert piped("hello", "--session", "work", "--no-save") == 2
    assert "--session work saves the conversation and --no-save does not" in capsys.readouterr().err


def test_going_on_without_keeping_is_said(piped, capsys):
    assert piped("hello", "--session", "work", "--save") == 0 and piped("again", "--session", "work", "--continue") == 0
    assert "what is said now is not kept (--no-save)" in capsys.readouterr().err


def test_nobody_is_told_of_keys_that_nobody_listens_for():
    class Live(Screen):
        said: list = []

        def status(self, text, force=False):
            self.said.append(text)

    for keys in (True, False):
        Live.said.clear()
        view = ReplyView(Live(out=Terminal(), err=Terminal()), 192, keys=keys)
        view.feed(TokenDecoded(9, 12, " w12", "thought", 9))
        assert ("Ctrl-T" in Live.said[0]) is keys


def test_a_terminal_and_json_exclude_each_other(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["chat", "--json"]) == 2 and main(["chat"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "--json is for a single question" in err[0] and "terminal on stdout" in err[1]
