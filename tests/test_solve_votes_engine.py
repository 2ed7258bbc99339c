"""Votes by the real engine, held to a schema, stopped in the middle of the second reply's answer and gone on with."""

from __future__ import annotations

import json

from zoomr_local.attempts import AttemptLog
from zoomr_local.checkpoint import Checkpoints
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.events import TokenDecoded
from zoomr_local.journal import Manifest, record_key
from zoomr_local.model import Model
from zoomr_local.problems import Problem
from zoomr_local.sampling import SamplingParams
from zoomr_local.schema import compile_schema
from zoomr_local.solve import Solver, solve_all
from zoomr_local.thinking import ThinkingLimits
from zoomr_models import bundled_model_path

SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["answer"]}
PROBLEM = Problem("a", ({"role": "user", "content": "oak is 3. ash is oak plus 4. What is ash?"},), "7", 1)
MANIFEST = Manifest({}, {}, {})


class Watch:
    """Counts the tokens of answers; ``stop`` turns true at the n-th."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.answered, self.in_the_first, self.stop_at = 0, 0, stop_at

    def started(self, problem) -> None:
        self.in_the_first = self.answered

    def event(self, event) -> None:
        self.answered += isinstance(event, TokenDecoded) and event.role == "answer"

    def finished(self, record) -> None: ...

    def stopping(self) -> bool:
        return self.stop_at is not None and self.answered >= self.stop_at


def run(model, folder, watch: Watch) -> list[dict]:
    folder.mkdir(exist_ok=True)
    engine = Engine(model, EngineConfig(threads=1, kv_budget=256))
    key = lambda problem: record_key(problem.asked(), MANIFEST)  # noqa: E731
    sampling = SamplingParams(1.0, top_k=0, top_p=1.0, min_p=0.0, seed=5, grammar=compile_schema(SCHEMA, "s").grammar)
    written: list[dict] = []
    try:
        solver = Solver(
            model, engine, sampling, 300, key, watch.stopping, checkpoints=Checkpoints(folder / "ck", MANIFEST, folder / "out.jsonl", 1000),
            limits=lambda max_tokens: ThinkingLimits(40), votes=2, attempts=AttemptLog.beside(folder / "out.jsonl"),
        )  # fmt: skip
        (folder / "ck").mkdir(exist_ok=True)
        assert solve_all([PROBLEM], solver, written.append, watch) == (watch.stop_at is None)
    finally:
        engine.close()
    return written


def test_votes_stopped_in_an_answer_go_on_with_the_same_tokens(tmp_path):
    model = Model.open(bundled_model_path())
    try:
        seen = Watch()
        (whole,) = run(model, tmp_path / "whole", seen)
        assert [v["valid"] for v in whole["votes"]] == [True, True] and 0 <= json.loads(whole["content"])["answer"] <= 9
        assert run(model, tmp_path / "cut", Watch(seen.in_the_first + 2)) == []
        assert (tmp_path / "cut" / "out.jsonl.attempts").exists() and any((tmp_path / "cut" / "ck").iterdir())
        (again,) = run(model, tmp_path / "cut", Watch())
    finally:
        model.close()
    assert again["votes"][1].pop("resumed") == 1
    assert {k: v for k, v in again.items() if k != "timing"} == {k: v for k, v in whole.items() if k != "timing"}
    assert not (tmp_path / "cut" / "out.jsonl.attempts").exists() and not any((tmp_path / "cut" / "ck").iterdir())
