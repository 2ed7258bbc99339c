"""/model and /edit: another model in a running chat, another text for the last message; on scripted engines."""

from __future__ import annotations

import os
import signal
import stat
import sys
from contextlib import ExitStack, contextmanager

import pytest
from chats import ANSWER, Chat
from scripted import ScriptedSampler
from talk import PLAIN, TalkModel, talking

from zoomr_cli.chat_editor import edited
from zoomr_cli.chat_models import ChatModels
from zoomr_local import generation
from zoomr_local.dialects import Summaries
from zoomr_local.errors import ModelError, UnsupportedModel, UsageError

OTHER = PLAIN.replace("<end>", "<end><end>")
REFUSES = "{% if messages|length > 1 %}{{ raise_exception('one question only') }}{% endif %}{{ messages[-1].content }}"


class Models:
    """What a chat's /model opens: scripted models by name; ``open`` says which are open."""

    def __init__(self):
        self.open: list[str] = []
        self.recorders: list[str] = []

    @contextmanager
    def __call__(self, name):
        if name == "missing":
            raise ModelError("missing: no such file")
        if name == "mamba":
            raise UnsupportedModel("mamba has no KV cache")
        model = TalkModel({None: PLAIN, "refuses": REFUSES}.get(name, OTHER))
        model.name = name or "first"
        with talking(budget=256 if name else 192, model=model) as engine:
            if name == "plain":
                engine.summaries = Summaries("extractive", "no markers")
            self.open.append(model.name)
            try:
                yield model, engine
            finally:
                self.open.remove(model.name)

    @contextmanager
    def record(self, engine):
        if engine.model.name == "unrecorded":
            raise UsageError("--trace t: no space")
        self.recorders.append(engine.model.name)
        yield None
        self.recorders.remove(engine.model.name)


@pytest.fixture
def switching(tmp_path, monkeypatch):
    """(chat, models) of a chat that can change its model."""
    monkeypatch.setattr(generation, "LlamaSampler", ScriptedSampler)  # also while one `talking` begins before another ends
    known = Models()
    with ExitStack() as stack:
        models = stack.enter_context(ChatModels(known, known.record))
        _, engine = models.first()
        chat = Chat(engine, tmp_path)
        chat.loop.models = models
        yield chat, known
    assert known.open == known.recorders == []


def test_another_model_goes_on_with_the_text(switching):
    chat, known = switching
    assert "model: first (" in chat.type("/model")
    chat.type("hello", "again")
    before = chat.loop.engine
    text = chat.type("/model other")
    messages = chat.loop.talk.messages
    tokens = len(chat.loop.talk.model.tokenize(chat.loop.talk.model.render(messages)))
    assert f"other, policy zoomr, 256 cells; the next message reads the conversation again: 2 turns, {tokens} tokens" in text
    assert known.open == ["other"] and known.recorders == ["other"] and before._closed and chat.loop.engine is not before
    text = chat.type("and now")
    assert "reading all" in text and "the model was changed" in text and ANSWER in text
    assert [t.user for t in chat.loop.talk.turns] == ["hello", "again", "and now"] and chat.loop.budget_tokens == 256
    assert "reading all" not in chat.type("and then") and "/256" in chat.type("/think fold", "once more")
    assert "other" in chat.type("/model") and "other, policy" in chat.type("/clear", "/model other")


def test_what_a_model_gets_in_place_of_its_own_summaries_is_said(switching, capsys):
    chat, _ = switching
    chat.type("/model other")
    assert "summaries" not in capsys.readouterr().err
    chat.type("/model plain")
    assert "summaries: extractive; no markers" in capsys.readouterr().err


def test_right_after_another_model_the_text_can_be_saved_and_its_cache_once_it_has_answered(switching):
    chat, _ = switching
    text = chat.type("hello", "/model other", "/save kept")
    assert ", the text alone); to go on with it" in text and chat.loop.store.holds("kept")
    assert "the text alone" not in chat.type("again", "/save kept")
    assert "reads the conversation again" not in chat.type("/load kept") and [t.user for t in chat.loop.talk.turns] == ["hello", "again"]


@pytest.mark.parametrize("name, reason", [("missing", "no such file"), ("mamba", "no KV cache"), ("refuses", "one question only")])
def test_a_model_that_cannot_be_taken_leaves_the_old_one(switching, name, reason):
    chat, known = switching
    chat.type("hello")
    engine = chat.loop.engine
    text = chat.type(f"/model {name}")
    assert f"error: {name}" in text or "error: " in text
    assert reason in text and "; first stays" in text and known.open == ["first"] and chat.loop.engine is engine
    assert "reading all" not in chat.type("again") and len(chat.loop.talk.turns) == 2


def test_a_trace_that_cannot_go_on_is_said_and_the_new_model_is_there(switching):
    chat, known = switching
    assert "warning: nothing more is recorded: --trace t: no space" in chat.type("/model unrecorded") and known.recorders == []
    assert ANSWER in chat.type("hello")


def test_ctrl_t_and_ctrl_c_reach_the_new_models_engine(switching, monkeypatch):
    chat, _ = switching
    chat.type("/model other")
    asked = []
    monkeypatch.setattr(chat.loop.engine, "answer_now", lambda: asked.append("now"))
    chat.loop._keys._answer_now()
    assert asked == ["now"]


def test_pins_do_not_go_over_to_another_model_and_that_is_said(switching):
    chat, _ = switching
    chat.type("hello")
    chat.type("/pin 0")
    assert "the pin of block 0 is gone" in chat.type("/model other", "again") and "no block is pinned" in chat.type("/pin")


# ---------------------------------------------------------------- /edit


def editor(tmp_path, monkeypatch, script, variable="VISUAL"):
    """An editor that runs ``script`` (Python; the file's name is sys.argv[1])."""
    monkeypatch.delenv("VISUAL", raising=False)
    (tmp_path / "my editor.py").write_text("import sys, os, pathlib\nfile = pathlib.Path(sys.argv[1])\n" + script)
    monkeypatch.setenv(variable, f"{sys.executable} '{tmp_path}/my editor.py'")


@pytest.mark.parametrize("variable", ["VISUAL", "EDITOR"])
def test_the_last_message_is_edited_and_asked_anew(chat, tmp_path, monkeypatch, variable):
    editor(tmp_path, monkeypatch, "file.write_text(file.read_text().replace('two', 'three') + '\\n')", variable)
    assert "there is no message to edit; Ctrl-G" in chat.type("/edit")
    chat.type("one", "two\nlines")
    text = chat.type("/edit")
    assert "reading all" in text and ANSWER in text
    assert [t.user for t in chat.loop.talk.turns] == ["one", "three\nlines"]


@pytest.mark.parametrize("script, said", [
    ("pass", "the message is as it was"), ("file.write_text(' ')", "nothing is left of the message"), ("sys.exit(3)", "ended with code 3"),
    ("file.write_bytes(b'\\xff')", "not UTF-8"), ("os.unlink(file)", "No such file"),
])  # fmt: skip
def test_what_changes_nothing_asks_nothing(chat, tmp_path, monkeypatch, script, said):
    editor(tmp_path, monkeypatch, script)
    chat.type("one")
    assert said in (text := chat.type("/edit")) and ANSWER not in text
    assert [t.user for t in chat.loop.talk.turns] == ["one"] and "reading all" not in chat.type("two")


@pytest.mark.parametrize("text", ["a file\n", "of\r\nanother\r\nsystem\r\n"])
def test_a_file_that_was_sent_is_unchanged_with_the_line_ends_that_it_has(chat, tmp_path, monkeypatch, text):
    (tmp_path / "file").write_bytes(text.encode())
    chat.type(f"/read {tmp_path}/file")
    editor(tmp_path, monkeypatch, "pass")
    assert "the message is as it was" in chat.type("/edit") and [t.user for t in chat.loop.talk.turns] == [text]


def test_an_editor_that_is_not_there_is_said(chat, monkeypatch):
    chat.type("one")
    monkeypatch.setenv("VISUAL", "no-such-editor-here")
    assert "error: no-such-editor-here: No such file or directory; set VISUAL or EDITOR" in chat.type("/edit")
    monkeypatch.setenv("VISUAL", "vi 'x")
    assert "a quote is open" in chat.type("/edit")
    monkeypatch.delenv("VISUAL")
    monkeypatch.delenv("EDITOR", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no editor is known; set VISUAL or EDITOR" in chat.type("/edit")


def test_the_file_is_private_and_goes_and_ctrl_c_is_the_editors(tmp_path, monkeypatch):
    """The editor sends Ctrl-C to the chat, and finds that it can get one itself."""
    script = "import signal\nos.kill(os.getppid(), signal.SIGINT)\n"
    script += "file.write_text(f'{file} {file.stat().st_mode & 0o777:o} {signal.getsignal(signal.SIGINT) is signal.default_int_handler}')"
    editor(tmp_path, monkeypatch, script)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        name, mode, interrupted = edited("x").split()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (mode, interrupted) == (f"{stat.S_IRUSR | stat.S_IWUSR:o}", "True") and name.endswith(".md") and not os.path.exists(name)
