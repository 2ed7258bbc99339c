"""What goes where: with --json one JSON value on stdout and nothing else, and no colours where nobody wants them."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

pytest.importorskip("huggingface_hub")  # the extra `test` has it

from every_command import COMMANDS, PAGES, cheap, run  # noqa: E402

from zoomr_cli.main import app  # noqa: E402

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")
ESCAPE = re.compile(r"\x1b")
LINES = {"problems"}
"""Commands whose result is JSON lines anyway."""


def every_leaf() -> dict[str, typer.models.CommandInfo]:
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {word}": each for word, each in inner.items()}
    return found


def test_every_command_is_tried_here():
    assert set(COMMANDS) == set(every_leaf())


def test_every_command_has_json_or_writes_it_anyway():
    assert {name for name, command in every_leaf().items() if not any("--json" in p.opts for p in command.params)} == LINES


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with cheap(tmp_path_factory.mktemp("all")):
        yield


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_all_that_stands_on_stdout(place, capfd, name):
    assert run(name, *([] if name in LINES else ["--json"])) == 0
    said = capfd.readouterr()
    for text in said.out.splitlines() if name in LINES else [said.out]:
        assert isinstance(json.loads(text), dict)
    assert not ESCAPE.search(said.out + said.err), "neither is a terminal"
    assert "Traceback" not in said.err


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_is_one_line_on_stderr_and_nothing_on_stdout(place, capfd, name):
    assert run(name, *([] if name in LINES else ["--json"]), "--no-such-flag") == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("error: ")


# ---------------------------------------------------------------- a terminal


def on_a_terminal(folder: Path, **variables: str) -> dict[str, str]:
    """What each command writes to a terminal, stdout and stderr as one."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    ours, theirs = pty.openpty()
    command = [sys.executable, str(Path(__file__).with_name("every_command.py")), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the last one that had it open has gone
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait(60) == 0, written.decode(errors="replace")[-3000:]
    parts = written.decode().split("\x1e")[1:]
    found = {}
    for body, code in zip(parts[::2], parts[1::2], strict=True):
        name, _, text = body.partition("\n")
        found[name.strip()] = text
        assert code.strip() == "0", f"{name}: {text}"
    assert list(found) == [*COMMANDS, *PAGES]
    return found


def test_no_color_means_no_colours(tmp_path):
    plain = on_a_terminal(tmp_path, NO_COLOR="1")
    assert all(plain.values())
    assert {name: COLOUR.findall(text) for name, text in plain.items() if COLOUR.search(text)} == {}


def test_without_it_there_are_some(tmp_path):
    """So that the other test can fail."""
    coloured = {name for name, text in on_a_terminal(tmp_path).items() if COLOUR.search(text)}
    assert "doctor" in coloured and coloured & {"solve", "demo", "eval", "chat"}


# ---------------------------------------------------------------- other places to write to


def test_no_command_needs_more_than_ascii(tmp_path):
    """What an encoding cannot write comes as an escape, also where a terminal draws with lines and dots."""
    written = on_a_terminal(tmp_path, PYTHONIOENCODING="ascii")
    assert all(text.isascii() and "Traceback" not in text for text in written.values())


def program(folder: Path, *words: str, **more) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "zoomr_cli", *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.parametrize("words", [["policies"], ["problems", "dag", "-n", "2"], ["config", "show"], ["models", "ls"], ["--help"]], ids=" ".join)
def test_a_reader_that_has_gone_and_a_closed_stdout_are_no_traceback(tmp_path, words):
    read, write = os.pipe()
    os.close(read)
    gone = program(tmp_path, *words, stdout=write)
    os.close(write)
    closed = program(tmp_path, *words, preexec_fn=lambda: os.close(1))
    for process in (gone, closed):
        said = process.communicate()[1]
        assert "Traceback" not in said and "Exception" not in said and "rror" not in said, said
    assert (gone.returncode, closed.returncode) == (1, 0)


def test_a_look_ahead_at_other_letters_under_ascii_is_no_traceback(tmp_path):
    (tmp_path / "in.csv").write_text("question,answer\nWie groß ist ½ + ½?,1\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "zoomr_cli", "solve", "in.csv", "--dry-run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Wie gro\\xdf ist \\xbd + \\xbd?" in done.stdout and "Traceback" not in done.stderr
