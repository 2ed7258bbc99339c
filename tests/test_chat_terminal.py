"""`zoomr chat` in a real pseudo-terminal with the bundled model: stream, Ctrl-C, Ctrl-T, /kv, /save, restart, --continue.

With ZOOMR_CAST=FILE the first test writes what it saw as an asciicast (`asciinema play FILE`); docs/chat.md names the command."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from zoomr_models import bundled_model_path
from zoomr_models.tasks import generate

pytest.importorskip("pexpect", reason="pexpect is not installed (pip install '.[test]')")
pytest.importorskip("prompt_toolkit")

from terminal import PROMPT, Cast, Terminal  # noqa: E402

LONG = ("--max-tokens", "4000", "--think-budget", "off")
"""For a reply that is to be met while it is thought about: on a fast machine a short one is over before the key arrives."""


@pytest.fixture(scope="module")
def questions():
    return [p.prompt for p in generate("series", 3, seed=7, thoughts=3, split="dev")]


@pytest.fixture(scope="module")
def long_question():
    return generate("series", 1, seed=7, thoughts=40, split="dev")[0].prompt


def said(directory) -> dict:
    """What the saved conversation in ``directory`` says."""
    return json.loads((directory / "session.json").read_text())["note"]["conversation"]


def test_a_conversation_is_streamed_stopped_drawn_saved_and_gone_on_with(tmp_path, questions, long_question):
    cast = Cast(tmp_path) if os.environ.get("ZOOMR_CAST") else None
    chats = tmp_path / "zoomr-local" / "chats"
    with Terminal(tmp_path, *LONG, cast=cast) as first:
        first.prompt()
        first.begin(questions[0], "thought [0-9,]+ tokens")
        first.prompt()
        (turn,) = said(chats / "last")["turns"]
        assert turn["answer"] and turn["reasoning_tokens"] > 50, "saved after the turn"

        live = first.begin(long_question, "Ctrl-T answers now")
        with first.standing_still():
            assert re.search(r"thinking [0-9,]+ tokens · [\d.]+ s · KV \d+/256", live)
            first.child.sendintr()
        first.wait("stopped; what was written is kept")
        first.prompt()
        assert said(chats / "last")["turns"][1]["reason"] == "cancelled"

        drawn = first.type("/kv", "P pinned")
        assert re.search(r"KV cache: \d+ of 256 cells in use", drawn) and "[P" in drawn and " dropped " in drawn
        first.type("/sav", "did you mean /save?")
        first.type("/save kept", "--session kept --continue")
        first.type(questions[2], "thought [0-9,]+ tokens")
        uninterrupted = said(chats / "last")["turns"][2]
        assert re.search(r"turn .*adds", drawn := first.type("/kv all", "P pinned")) and " ram " in drawn, "earlier questions are paged out"
        assert first.leave() == 0

    with Terminal(tmp_path, "--session", "kept", "--continue", *LONG, cast=cast) as second:
        greeted = second.prompt()
        assert "kept: 2 turns" in greeted and "again" not in greeted
        assert "reading all" not in second.type(questions[2], "thought [0-9,]+ tokens")
        assert timeless(said(chats / "kept")["turns"][2]) == timeless(uninterrupted), "as if nothing had come between"
        assert second.leave() == 0
    if cast is not None:
        model = hashlib.sha256(bundled_model_path().read_bytes()).hexdigest()[:16]
        cast.save(Path(os.environ["ZOOMR_CAST"]), f"zoomr chat with the bundled model of sha256 {model}")


def timeless(turn: dict) -> dict:
    return {name: value for name, value in turn.items() if not name.endswith("seconds")}


@pytest.mark.parametrize("how", ["SIGTERM", "closed"])
def test_a_reply_is_kept_when_the_window_is_closed_or_the_chat_is_told_to_end(tmp_path, long_question, how):
    with Terminal(tmp_path, *LONG) as chat:
        chat.prompt()
        chat.begin(long_question, "thinking [0-9]+ tokens")
        if how == "closed":
            assert chat.close_window() == 130
        else:
            chat.child.kill(signal.SIGTERM)
            chat.wait("stopped; what was written is kept")
            assert chat.ended() == 130
    (turn,) = said(tmp_path / "zoomr-local" / "chats" / "last")["turns"]
    assert turn["user"] == long_question and turn["reason"] == "cancelled" and turn["reasoning_tokens"] > 0


def test_a_reply_is_kept_when_the_shell_does_not_say_that_the_window_is_closed(tmp_path, long_question):
    """The kernel tells the shell alone; the chat learns it from what it cannot write any more."""
    kept = tmp_path / "zoomr-local" / "chats" / "last"
    chat = Terminal(tmp_path, "--thinking", "show", *LONG, within='trap "" HUP; "$@"; exit')
    chat.prompt()
    chat.begin(long_question, "Need")
    chat.close_window()
    (turn,) = said(kept)["turns"]
    assert turn["user"] == long_question and turn["reason"] == "cancelled" and turn["reasoning_tokens"] > 0


def test_sigterm_ends_a_chat_that_waits_for_an_editor(tmp_path, questions):
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\necho is open\nexec sleep 600\n")
    editor.chmod(0o700)
    with Terminal(tmp_path, VISUAL=str(editor)) as chat:
        chat.prompt()
        chat.type(questions[0], "thought [0-9,]+ tokens")
        chat.begin("/edit", "is open")
        chat.child.kill(signal.SIGTERM)
        assert chat.ended() == 130


def test_sigterm_between_two_messages_ends_a_chat_at_once(tmp_path):
    with Terminal(tmp_path) as chat:
        chat.prompt()
        chat.child.kill(signal.SIGTERM)
        assert chat.ended() == 130 and "Traceback" not in chat.child.before


def test_keys_ctrl_t_answers_now_a_paste_is_one_message_and_what_is_typed_meanwhile_is_kept(tmp_path, long_question):
    with Terminal(tmp_path, "--no-save", *LONG) as chat:
        chat.prompt()
        chat.child.send(f"\x1b[200~Please read:\r\n{long_question}\x1b[201~")
        chat.begin("", "thinking [0-9]+ tokens")
        with chat.standing_still():
            chat.child.send("\x14and then")
        chat.wait("you asked for the answer")
        chat.wait(PROMPT + "[^>]*and then")  # what was typed ahead stands in the next prompt
        chat.child.send("\x03")
        chat.wait("Ctrl-D or /exit leaves")
        chat.prompt()
        chat.type("/stats", "all turns  1: ")
        assert chat.leave() == 0
    assert not (tmp_path / "zoomr-local").exists(), "--no-save writes nothing"


def test_thinking_is_dimmed_where_it_is_shown_and_lines_can_be_several(tmp_path, questions):
    with Terminal(tmp_path, "--no-save", "--thinking", "show", "--max-tokens", "600", "--think-budget", "20") as chat:
        chat.prompt()
        chat.child.send('"""')
        chat.child.send("\r")
        chat.child.send(questions[0] + "\r")
        chat.child.send('"""')
        chat.child.send("\r")
        chat.child.expect("\x1b\\[2m[^\x1b]*Next")
        chat.wait("it reached --think-budget")
        chat.prompt()
        assert chat.leave() == 0


def test_a_pin_outlives_a_restart_and_an_edited_message_is_asked_anew(tmp_path, questions):
    (tmp_path / "editor.py").write_text("import sys, pathlib\nfile = pathlib.Path(sys.argv[1])\nfile.write_text('Edited. ' + file.read_text())\n")
    editor = {"VISUAL": f"{sys.executable} {tmp_path}/editor.py"}
    with Terminal(tmp_path, "--max-tokens", "300", **editor) as chat:
        chat.prompt()
        chat.type(questions[0], "thought [0-9,]+ tokens")
        chat.type("/pin 0", r"block 0 \([0-9]+ tokens\) (is|was) .*it stays until /unpin 0")
        assert chat.leave() == 0
    last = tmp_path / "zoomr-local" / "chats" / "last"
    with Terminal(tmp_path, "--continue", "--max-tokens", "300", **editor) as chat:
        assert "again" not in chat.prompt()
        assert "Pcells" in chat.type("/kv all", "P pinned")
        chat.child.send("and then?")
        chat.child.send("\x07")  # Ctrl-G
        chat.wait("Edited. and then")
        chat.type("", "thought [0-9,]+ tokens")
        assert "Pcells" in chat.type("/kv all", "P pinned"), "a thought that is pinned is not dropped with the others"
        assert [t["user"] for t in said(last)["turns"]] == [questions[0], "Edited. and then?"] and said(last)["pinned"] == [0]
        text = chat.type("/edit", "reading all")
        assert "a turn was taken back" in text and "the pin of block 0 is gone" in text
        assert [t["user"] for t in said(last)["turns"]] == [questions[0], "Edited. Edited. and then?"]
        chat.type("/model nowhere.gguf", "zoomr-tiny.* stays")
        assert chat.leave() == 0


def test_the_history_is_private(tmp_path):
    with Terminal(tmp_path) as chat:
        chat.prompt()
        chat.type("/think", "thinking: fold")
        assert chat.leave() == 0
    history = tmp_path / "zoomr-local" / "chat-history"
    assert "+/think" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_the_committed_recording_is_whole():
    path = Path(__file__).parent.parent / "docs" / "chat.cast"
    header, *events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    times, shown = [at for at, _, _ in events], "".join(data for _, _, data in events)
    assert header["version"] == 2 and re.search("sha256 [0-9a-f]{16}$", header["title"]) and path.stat().st_size < 200_000
    assert times == sorted(times) and {kind for _, kind, _ in events} == {"o"} and 30 < times[-1] < 300
    for words in ("Ctrl-T answers now", "stopped; what was written is kept", "cells in use", "saved: ~/.local/state/", "--session kept --continue", "kept: 2 turns"):
        assert words in shown
    assert "reading all" not in shown and str(Path.home()) not in shown
