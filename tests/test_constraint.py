"""A reply held to a schema by the real engine and the bundled model: only its answer, and after a save as before."""

from __future__ import annotations

import json

import numpy as np
import pytest

from zoomr_local.constraint import Constraint
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.errors import UsageError
from zoomr_local.events import Finished, TokenDecoded
from zoomr_local.libllama import LlamaGrammar, LlamaSampler
from zoomr_local.model import Model
from zoomr_local.sampling import SamplingParams
from zoomr_local.schema import compile_schema
from zoomr_local.thinking import ThinkingLimits
from zoomr_models import bundled_model_path

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 9}, "why": {"type": "string", "maxLength": 12}},
    "required": ["answer", "why"],
}
GRAMMAR = compile_schema(SCHEMA, "s.json").grammar
THINKING = ThinkingLimits(40)


@pytest.fixture(scope="module")
def model():
    model = Model.open(bundled_model_path())
    yield model
    model.close()


@pytest.fixture(scope="module")
def prompt(model) -> list[int]:
    return model.tokenize(model.render([{"role": "user", "content": "oak is 3. ash is oak plus 4. What is ash?"}]))


@pytest.fixture
def engine(model):
    engine = Engine(model, EngineConfig(threads=1, kv_budget=256))
    yield engine
    engine.close()


def sampled(temperature: float, grammar: str | None = GRAMMAR) -> SamplingParams:
    return SamplingParams(temperature, top_k=0, top_p=1.0, min_p=0.0, seed=5, grammar=grammar)


def holds(content: str) -> bool:
    data = json.loads(content)
    return list(data) == ["answer", "why"] and data["answer"] in range(10) and len(data["why"]) <= 12


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_thoughts_are_free_and_the_answer_follows_the_schema(engine, prompt, temperature):
    free = list(engine.generate(prompt, sampled(temperature, None), 300, limits=THINKING))
    held = list(engine.generate(prompt, sampled(temperature), 300, limits=THINKING))
    assert held[-1].reason == "stop" and holds(held[-1].content)
    assert held[-1].reasoning == free[-1].reasoning != ""
    if temperature == 0.0:  # unheld it answers in words
        with pytest.raises(ValueError):
            json.loads(free[-1].content)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_without_thinking_the_schema_holds_from_the_first_token(engine, model, prompt, temperature):
    done = list(engine.generate([*prompt, model.markers.think_close], sampled(temperature), 200))[-1]
    assert done.reason == "stop" and holds(done.content)
    assert (done.reasoning_tokens, done.reasoning) == (0, "")


def test_a_reply_out_of_tokens_is_cut_off_and_not_completed(engine, model, prompt):
    done = list(engine.generate([*prompt, model.markers.think_close], sampled(0.0), 5))[-1]
    assert done.reason == "length"
    with pytest.raises(ValueError):
        json.loads(done.content)


@pytest.mark.parametrize("answer_tokens", [1, 7])
def test_a_reply_saved_in_the_middle_of_its_answer_goes_on_with_the_same_tokens(engine, prompt, tmp_path, answer_tokens):
    events, saved = [], False
    for event in engine.generate(prompt, sampled(1.5), 300, limits=THINKING):
        events.append(event)
        written = sum(isinstance(e, TokenDecoded) and e.role == "answer" for e in events)
        if written == answer_tokens and not saved:
            engine.save(tmp_path / "s")
            saved = True
    whole = events[-1]
    engine.load(tmp_path / "s")
    again = list(engine.resume())[-1]
    assert isinstance(again, Finished) and holds(whole.content)
    assert (again.content, again.reasoning, again.completion_tokens) == (whole.content, whole.reasoning, whole.completion_tokens)


def test_a_reply_that_the_model_has_ended_can_be_saved_and_ends_again(engine, prompt, tmp_path):
    """The token that ended it is no part of what followed the grammar."""
    *_, done = engine.generate(prompt, sampled(0.0), 300, limits=THINKING)
    assert done.reason == "stop"
    engine.save(tmp_path / "s")
    engine.load(tmp_path / "s")
    (again,) = engine.resume()
    assert (again.content, again.reason, again.completion_tokens) == (done.content, "stop", done.completion_tokens)


# ---------------------------------------------------------------- the draw


class Logits:
    """A context that has only logits, of the test's making."""

    def __init__(self, n_vocab: int, seed: int) -> None:
        self.logits = np.random.default_rng(seed).normal(0, 3, n_vocab).astype(np.float32)


@pytest.fixture
def given_logits(monkeypatch):
    monkeypatch.setattr("zoomr_local.libllama.sampler.LlamaSampler._candidates", _candidates)


def _candidates(self, context):
    from zoomr_local.libllama.grammar import CANDIDATE

    found = np.zeros(len(context.logits), CANDIDATE)
    found["id"], found["logit"] = np.arange(len(context.logits)), context.logits
    return found


def test_greedy_takes_the_best_of_all_that_the_grammar_allows(model, given_logits):
    grammar = LlamaGrammar(model.llama, GRAMMAR)
    sampler = LlamaSampler(model.llama, temperature=0.0)
    for seed in range(60):
        context = Logits(model.llama.n_vocab, seed)
        allowed = [t for t in range(model.llama.n_vocab) if grammar.allows(t)]  # slow and obvious
        token = sampler.sample_within(context, grammar)
        assert token == max(allowed, key=lambda t: context.logits[t])
        if model.llama.is_eog(token):
            return
        grammar.accept(token)
    raise AssertionError("sixty random tokens did not end it")


def test_draws_are_counted_so_that_a_restored_sampler_goes_on_alike(model, given_logits):
    def run(sampler, grammar, seeds):
        tokens = []
        for seed in seeds:
            tokens.append(sampler.sample_within(Logits(model.llama.n_vocab, seed), grammar))
            grammar.accept(tokens[-1])
        return tokens

    grammar = compile_schema({"type": "array", "items": {"type": "string"}}, "s").grammar
    one, first = LlamaSampler(model.llama, temperature=1.0, seed=9), LlamaGrammar(model.llama, grammar)
    before, after = run(one, first, range(8)), run(one, first, range(8, 16))
    two, second = LlamaSampler(model.llama, temperature=1.0, seed=9), LlamaGrammar(model.llama, grammar)
    assert one.draws > 16, "no draw was refused, so this test shows nothing"
    for token in before:
        second.accept(token)
    two.skip(_draws_of(model, grammar, before))
    assert run(two, second, range(8, 16)) == after


def _draws_of(model, grammar, tokens) -> int:
    sampler, held = LlamaSampler(model.llama, temperature=1.0, seed=9), LlamaGrammar(model.llama, grammar)
    for seed, token in enumerate(tokens):
        assert sampler.sample_within(Logits(model.llama.n_vocab, seed), held) == token
        held.accept(token)
    return sampler.draws


def test_a_marker_is_never_taken_for_the_letters_of_its_name(model, given_logits):
    """llama.cpp's grammar would let "<think>" stand in a string."""
    markers = model.markers
    constraint = Constraint(model, [markers.think_open, markers.think_close], compile_schema({"type": "string"}, "s").grammar)
    context = Logits(model.llama.n_vocab, 1)
    context.logits[[markers.think_open, markers.summary_open, markers.think_close]] = 99
    sampler = LlamaSampler(model.llama, temperature=0.0)
    drawn = {constraint.sample(sampler, context) for _ in range(4)}
    assert not drawn & {markers.think_open, markers.summary_open, markers.think_close}


def test_a_model_that_opens_thinking_itself_may_do_so_once_and_first(model, given_logits):
    opens = model.markers.think_open
    context = Logits(model.llama.n_vocab, 1)
    context.logits[opens] = 99
    sampler = LlamaSampler(model.llama, temperature=0.0)
    word = model.tokenize("ash")
    draw = lambda prompt, n: [Constraint(model, prompt, GRAMMAR).sample(sampler, context) for _ in range(n)]  # noqa: E731
    assert draw(word, 1) == [opens]
    assert draw([opens, *word], 1) != [opens]
    assert draw([opens, model.markers.think_close], 1) != [opens]
    assert draw([opens, model.markers.think_close, *word], 1) == [opens], "markers of an earlier text close nothing"
    constraint = Constraint(model, word, GRAMMAR)
    assert constraint.sample(sampler, context) == opens
    assert constraint.sample(sampler, context) != opens
    late = Constraint(model, word, GRAMMAR)
    context.logits[opens] = -99
    late.sample(sampler, context)
    context.logits[opens] = 99
    assert late.sample(sampler, context) != opens


def test_a_grammar_that_is_none_is_a_usage_error_and_no_crash(engine, prompt):
    with pytest.raises(UsageError, match="cannot use the grammar"):
        list(engine.generate(prompt, sampled(0.0, "root ::= none"), 5))
