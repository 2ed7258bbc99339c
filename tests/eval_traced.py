"""A solver on books that worker processes can open: for the tests of `zoomr eval --trace --jobs`. Tests only."""

from __future__ import annotations

from contextlib import contextmanager

from scripted import ScriptedSampler
from talk import words
from traced import GREEDY, engine_of, thoughts

from zoomr_cli.eval_trace import TracedSolver


@contextmanager
def open_solver(files, config):
    """As `evaluate.py` opens one for each process."""
    ScriptedSampler.script = [*thoughts(6), *words(1)]
    with engine_of(config.policy, config.kv_budget) as engine:
        engine.config = config
        yield TracedSolver(engine.model, engine, GREEDY, 400, files=files)
