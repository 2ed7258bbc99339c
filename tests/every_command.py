"""Every command on something cheap: scripted models, a hub of its own. As a program it runs them all, one after the other. Tests only.

    python every_command.py FOLDER        # what each prints lies between lines of \\x1e and its name
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fake_engine import FakeEngine, opener
from hub_server import HubServer
from scripted import ScriptedSampler
from talk import CLOSE, OPEN, UNTHINK, talking, words
from test_cli_bench import measured
from traced import record

SMALL = ["-d", "256", "-p", "32", "-n", "8", "-r", "1"]
REPLY = [*words(30), OPEN, *words(5), CLOSE, UNTHINK, *words(12)]
COMMANDS: dict[str, list[str]] = {
    "chat": ["chat", "--no-save"],
    "solve": ["solve", "in.jsonl", "-o", "out.jsonl", "--overwrite"],
    "demo": ["demo"],
    "view": ["view", "trace.jsonl"],
    "plan": ["plan", "--memory", "4GiB"],
    "eval": ["eval", "--suite", "in.jsonl", "--policy", "full,zoomr", "--kv-budget", "256", "-o", "out", "--overwrite"],
    "problems": ["problems", "dag", "-n", "2"],
    "bench": ["bench", *SMALL],
    "policies": ["policies"],
    "calibrate": ["calibrate", "-o", "calibration.json"],
    "doctor": ["doctor"],
    "models ls": ["models", "ls"],
    "models pull": ["models", "pull", "user/tiny"],
    "models show": ["models", "show", "zoomr-tiny"],
    "models rm": ["models", "rm", "user/tiny", "--yes"],
    "config show": ["config", "show", "--origin"],
    "config path": ["config", "path"],
}
"""In an order in which each finds what it needs: `rm` what `pull` fetched."""
PAGES = {"help": ["--help"], "help of a command": ["solve", "--help"]}


@contextmanager
def cheap(folder: Path) -> Iterator[None]:
    """While this lasts the commands run in ``folder`` and compute nothing."""
    from zoomr_local.doctor import OK, Check
    from zoomr_local.policies.heads import Calibration
    from zoomr_models import bundled_model_path

    (folder / "in.jsonl").write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"ask {i}", "answer": "4"}) + "\n" for i in range(2)))
    record(folder / "trace.jsonl")
    points = [{"depth": 256, "prefill": 0.01, "decode": 0.1}, {"depth": 4096, "prefill": 0.02, "decode": 0.2}]
    replaced = {
        "zoomr_cli.solve.open_engine": opener(FakeEngine()), "zoomr_cli.versions.versions": lambda: {"zoomr": "test"},
        "zoomr_local.bench_meter.why_busy_now": lambda *_: "", "zoomr_local.bench.measured": lambda case, progress: measured(case),
        "zoomr_local.bench.calibrate": lambda *_: {"load_seconds": 1, "token_bytes": 2048, "points": points},
        "zoomr_local.calibrate.calibrate": lambda *_: Calibration((3.0, 1.0, 2.0, 7.5), 0.93, 8, 800),
        "zoomr_local.doctor.selftest": lambda *_: iter([Check("selftest", OK, "not run here")]),
    }  # fmt: skip
    before = os.getcwd()
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        hub = stack.enter_context(HubServer({"user/tiny": {"tiny-Q8_0.gguf": bundled_model_path().read_bytes()}}))
        homes = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}
        stack.enter_context(patch.dict(os.environ, homes))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def run(name: str, *more: str) -> int:
    """Run one command inside `cheap`, with ``more`` flags; its exit code."""
    from zoomr_cli.main import main

    if name != "chat":
        return main([*{**COMMANDS, **PAGES}[name], *more])

    with talking(budget=192) as engine:

        @contextmanager
        def open_engine(model_file: Path, config: Any, n_gpu_layers: int) -> Iterator[Any]:
            yield engine.model, engine

        ScriptedSampler.script = REPLY
        with patch("zoomr_cli.solve.open_engine", open_engine), patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n"))):
            return main([*COMMANDS[name], *more])


if __name__ == "__main__":
    from zoomr_cli.__main__ import open_streams

    open_streams()
    with cheap(Path(sys.argv[1])):
        for name in [*COMMANDS, *PAGES]:
            print(f"\x1e{name}", flush=True)
            code = run(name)
            sys.stderr.flush()
            print(f"\x1e{code}", flush=True)
