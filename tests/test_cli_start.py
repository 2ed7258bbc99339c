"""How the program starts: Ctrl-C before it has, what it imports, and what shells complete."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"numpy", "jinja2", "gguf", "llama_cpp", "prompt_toolkit", "huggingface_hub", "matplotlib", "asyncio", "http", "ssl", "zoomr_local.engine"}
PROGRAM = "import sys; from zoomr_cli.__main__ import run; sys.exit(run())"


def start(*words: str, code: str = PROGRAM, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [variables.pop("FIRST", ""), *sys.path])), **variables}
    return subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


# ---------------------------------------------------------------- Ctrl-C


INTERRUPTING = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(300)\n"


def test_ctrl_c_while_it_is_being_imported_is_quiet(tmp_path):
    """A module of typer's name stands before the real one and presses Ctrl-C in the middle of the imports."""
    (tmp_path / "typer.py").write_text(INTERRUPTING)
    done = start("policies", FIRST=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_in_an_import_that_catches_everything_is_quiet_too(tmp_path):
    (tmp_path / "typer.py").write_text(f"try:\n    exec({INTERRUPTING!r})\nexcept BaseException:\n    raise ImportError('swallowed')\n")
    done = start("policies", FIRST=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_later_is_the_same(tmp_path):
    """Once a command runs: no traceback either, whoever catches it."""
    (tmp_path / "zoomr_models.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(300)\n")
    done = start("problems", "dag", "-n", "1", FIRST=str(tmp_path))
    assert (done.returncode, done.stdout) == (130, "") and done.stderr in ("", "error: interrupted\n")


def test_a_ctrl_c_that_the_shell_ignores_stays_ignored(tmp_path):
    """A shell starts programs in the background with SIGINT ignored; then nothing here may answer to it."""
    code = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {PROGRAM!r}, 'policies'])"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Pressing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            print('pressed', file=sys.stderr)\n"
        "sys.meta_path.insert(0, Pressing())\n"
    )
    done = start(code=code, FIRST=str(tmp_path))
    assert done.returncode == 0 and done.stderr == "pressed\n" and done.stdout.startswith("zoomr ")


def test_the_console_script_is_the_module_that_imports_nothing():
    text = (ROOT / "pyproject.toml").read_text()
    assert '\nzoomr = "zoomr_cli.__main__:run"\n' in text
    code = "import sys; before = set(sys.modules); import zoomr_cli.__main__; print(sorted(m for m in set(sys.modules) - before if 'zoomr' not in m))"
    loaded = start(code=code).stdout
    assert "'typer'" not in loaded and loaded.count(",") < 20, loaded


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("words", [["--help"], ["chat", "--help"], ["solve", "--help"], ["config", "path"], ["problems", "--help"]], ids=" ".join)
def test_nothing_heavy_is_imported_for_help(words):
    code = (
        "import json, sys\nfrom zoomr_cli.main import main\n"
        "code = main(sys.argv[1:])\nprint(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)"
    )
    done = start(*words, code=code)
    returned, modules = json.loads(done.stderr.splitlines()[-1])
    assert returned == 0 and done.stdout
    assert not HEAVY & set(modules), HEAVY & set(modules)


# ---------------------------------------------------------------- completion


def completed(shell: str, line: str) -> list[str]:
    """What ``line`` is completed to, by the protocol of the shell's own script."""
    words = line.split(" ")
    variables = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = start(_ZOOMR_COMPLETE=f"complete_{shell}", COLUMNS="40", **variables)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    if shell == "zsh":
        inside = done.stdout.strip().removeprefix("_arguments '*: :((").removesuffix("))'")
        return [entry.split('"')[1].replace(r"\\:", ":") for entry in inside.splitlines()]
    return [entry.split("\t")[0] for entry in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_flags_and_values(shell, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--Thinker-GGUF" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "thinker-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert completed(shell, "zoomr so") == ["solve"]
    assert completed(shell, "zoomr chat --kv-") == ["--kv-budget", "--kv-type", "--kv-ram", "--kv-disk", "--kv-dir", "--kv-page-type"], "a line each"
    assert completed(shell, "zoomr solve -m ") == ["zoomr-tiny", "plain-tiny", "breadcrumbs-tiny", "some/Thinker-GGUF:Q4_K_M"]
    if shell == "bash":
        assert completed(shell, "zoomr config ") == ["show", "path"]
        assert completed(shell, "zoomr solve --policy rec") == ["recency"]
        assert completed(shell, "zoomr models rm some") == ["some/Thinker-GGUF:Q4_K_M"]
        assert completed(shell, "zoomr config show ch") == ["chat"]


def test_a_broken_file_does_not_disturb_completion(monkeypatch, tmp_path):
    (tmp_path / "broken.toml").write_text("= = =")
    monkeypatch.setenv("ZOOMR_CONFIG", str(tmp_path / "broken.toml"))
    assert completed("bash", "zoomr solve --policy rec") == ["recency"]


@pytest.mark.parametrize("shell, words", [("bash", "complete -o default -F"), ("zsh", "compdef"), ("fish", "complete --command zoomr")])
def test_the_script_of_each_shell(shell, words):
    done = start(_ZOOMR_COMPLETE=f"source_{shell}")
    assert words in done.stdout and "_ZOOMR_COMPLETE=complete_" + shell in done.stdout


def test_bash_itself_completes(tmp_path):
    """The script that is installed, in a real bash."""
    program = tmp_path / "zoomr"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{PROGRAM}' \"$@\"\n")
    program.chmod(0o755)
    script = start(_ZOOMR_COMPLETE="source_bash").stdout
    asking = f"{script}\nCOMP_WORDS=(zoomr solve --policy rec); COMP_CWORD=3; _zoomr_completion zoomr\necho \"${{COMPREPLY[@]}}\""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "--norc", "-c", asking], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "recency\n", done.stderr


def test_showing_the_script_takes_the_shell_it_is_in():
    """--show-completion asks which shell started it; this one is started by bash."""
    code = f"{sys.executable} -c '{PROGRAM}' --show-completion; exit $?"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "--norc", "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "complete -o default -F _zoomr_completion zoomr" in done.stdout


def test_the_signal_is_answered_as_before_once_the_program_runs(monkeypatch):
    from zoomr_cli import __main__ as entry
    from zoomr_cli import main as commands

    seen = []
    monkeypatch.setattr(commands, "main", lambda: seen.append(signal.getsignal(signal.SIGINT)) or 7)
    before = signal.getsignal(signal.SIGINT)
    assert entry.run() == 7 and seen == [before]
