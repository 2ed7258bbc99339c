"""Thinking that headers of several tokens mark (gpt-oss): what is thought and what is answer, and how the one is ended for the other."""

from __future__ import annotations

import json
import re

import pytest
from harmony import (
    ANALYSIS, ASSISTANT, CHANNEL, CLOSING, COMMENTARY, CONSTRAIN, END, FINAL, JSON, MESSAGE, OWN, PROMPT, RETURN, ROLE_USER, SPECIAL,
    START, THINK, HarmonyModel,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import STOP, WORD, ScriptedSampler
from talk import GREEDY, of, say, talking, words

from zoomr_local.conversation import Conversation
from zoomr_local.dialects import ExtractiveDialect, LearnedDialect, Markers, Phrases, PromptedDialect, Summaries
from zoomr_local.events import BlockClosed, ThinkingCut, TokenDecoded, TokenInjected
from zoomr_local.libllama import LlamaSampler
from zoomr_local.reply import Reply
from zoomr_local.sampling import SamplingParams
from zoomr_local.thinking import CLOSING as SENTENCE
from zoomr_local.thinking import ThinkingLimits, hand_over, text_after

MODEL = HarmonyModel()
MARKERS = MODEL.markers
W, V = WORD + 2, WORD + 3
KINDS = {
    "learned": lambda prompt: LearnedDialect(MARKERS, prompt),
    "extractive": lambda prompt: ExtractiveDialect(MARKERS, prompt, 16),
    "prompted": lambda prompt: PromptedDialect(MARKERS, prompt, 16, 8, Phrases.of(MODEL.tokenize)),
}


@pytest.fixture(params=KINDS)
def dialect(request):
    return KINDS[request.param]


def roles(dialect, tokens):
    return [dialect.feed(token, MODEL.piece(token)).role for token in tokens]


def marks(n):
    return ["marker"] * n


def test_a_thought_and_an_answer(dialect):
    read = dialect(PROMPT)
    assert read.header == [START, ASSISTANT] and read.role == "answer"
    assert roles(read, [*THINK, W, V]) == [*marks(3), "thought", "thought"] and read.header is None
    assert roles(read, CLOSING) == marks(6) and read.role == "answer"
    assert roles(read, [W, W]) == ["answer"] * 2 and (read.channels.first, read.channels.stop) == (0, 8)


def test_an_answer_without_a_thought(dialect):
    read = dialect(PROMPT)
    assert roles(read, [*OWN, W]) == [*marks(3), "answer"] and read.channels.first is None
    assert roles(dialect(PROMPT), [MESSAGE, W]) == ["marker", "answer"], "no channel is named"


def test_thoughts_one_after_the_other_and_other_channels(dialect):
    read = dialect(PROMPT)
    again = [END, START, ASSISTANT]
    assert roles(read, [*THINK, W, *again, *THINK, W, *again, CHANNEL, COMMENTARY, MESSAGE, W]) == [
        *marks(3), "thought", *marks(6), "thought", *marks(6), "thought"]  # fmt: skip
    assert roles(read, [*again, CHANNEL, FINAL, CONSTRAIN, JSON, MESSAGE, W]) == [*marks(8), "answer"]
    assert (read.channels.first, read.channels.stop) == (0, 21), "all of it up to the header of the answer"


def test_special_tokens_are_never_text(dialect):
    read = dialect(PROMPT)
    assert roles(read, [*OWN, W, MESSAGE, W]) == [*marks(3), "answer", "marker", "answer"]
    assert roles(read, [CHANNEL, ANALYSIS, MESSAGE, W]) == [*marks(3), "thought"]


def test_the_end_of_the_answer_ends_the_reply(dialect):
    read = dialect(PROMPT)
    assert not any(read.ends(token) for token in (END, W))
    roles(read, [*THINK, W])
    assert not read.ends(END)
    roles(read, CLOSING)
    assert read.ends(END) and not read.ends(W)


@pytest.mark.parametrize("prompt, role, header", [
    ([], "answer", None), ([W], "answer", None), (PROMPT, "answer", [START, ASSISTANT]), ([*PROMPT, CHANNEL], "answer", [START, ASSISTANT, CHANNEL]),
    ([*PROMPT, *THINK], "thought", None), ([*PROMPT, *THINK, W], "thought", None), ([*PROMPT, *THINK, W, *CLOSING], "answer", None),
    ([*PROMPT, *THINK, W, END], "answer", []), (PROMPT[:4], "answer", None),
])  # fmt: skip
def test_where_a_prompt_leaves_off(dialect, prompt, role, header):
    read = dialect(prompt)
    assert (read.role, read.header) == (role, header)


def test_a_header_that_the_prompt_began_is_read_on(dialect):
    read = dialect([*PROMPT, CHANNEL])
    assert roles(read, [ANALYSIS, MESSAGE, W]) == ["marker", "marker", "thought"] and read.channels.first == 0
    assert roles(dialect([*PROMPT, CHANNEL]), [FINAL, MESSAGE, W]) == ["marker", "marker", "answer"]


MESSAGE_OF_TEXT = re.compile(r"(.*?)<\|message\|>((?:(?!<\|(?:start|channel|end)\|>).)*)(<\|end\|>)?", re.DOTALL)


def by_text(text):
    """(thoughts, answers) of a reply behind ``<|start|>assistant``: the obvious reader, of the whole text at once."""
    found = {True: "", False: ""}
    for header, body, end in MESSAGE_OF_TEXT.findall("<|start|>assistant" + text):
        _, named, channel = header.rpartition("<|end|>")[2].rpartition("<|channel|>")
        thinks = bool(named) and not channel.startswith("final")
        found[thinks] += body.replace("<|message|>", "")
        if end and not thinks:
            break
    return found[True], found[False]


HEADERS = [[*THINK], [*OWN], [CHANNEL, COMMENTARY, MESSAGE], [CHANNEL, FINAL, CONSTRAIN, JSON, MESSAGE], [MESSAGE]]
BODY = st.lists(st.sampled_from([W, V, STOP, ANALYSIS, FINAL]), max_size=5)
MESSAGES = st.lists(st.tuples(st.sampled_from(HEADERS), BODY, st.sampled_from([[END, START, ASSISTANT], [END], []])), max_size=5)


@settings(max_examples=200, deadline=None)
@given(MESSAGES)
def test_the_reader_agrees_with_the_obvious_one(messages):
    script = [token for header, body, between in messages for token in (*header, *body, *between)]
    read, texts = KINDS["extractive"](PROMPT), {"thought": "", "answer": ""}
    for token in script:
        if read.ends(token):
            break
        fed = read.feed(token, MODEL.piece(token))
        if fed.role != "marker":
            texts[fed.role] += MODEL.piece(token).decode()
    assert (texts["thought"], texts["answer"]) == by_text("".join(MODEL.piece(t).decode() for t in script))


@pytest.mark.parametrize("cut", range(14))
def test_a_saved_reader_goes_on_alike(dialect, cut):
    script = [*THINK, W, STOP, *CLOSING, W, V, W]
    whole, first = dialect(PROMPT), dialect(PROMPT)
    expected = roles(whole, script)
    found = roles(first, script[:cut])
    second = dialect(PROMPT)
    second.restore(json.loads(json.dumps(first.state())))
    assert found + roles(second, script[cut:]) == expected and second.state() == whole.state()


def test_the_state_of_another_dialect_is_refused(dialect):
    for state in ("thought", ["thought"], ["thought", [1]], {"role": "thought", "cuts": [1, 1, 1, 1]}):
        with pytest.raises(ValueError):
            dialect(PROMPT).restore(state)


def test_how_channels_are_found():
    assert MARKERS.channels is not None and MARKERS.thinking and MARKERS.ends_thinking and MARKERS.ids == {START, CHANNEL, MESSAGE, END}
    for lost in SPECIAL:
        assert Markers.find({**SPECIAL, lost: None}.get, tokenize=MODEL.tokenize).channels is None
    both = Markers.find({**SPECIAL, "<think>": 5, "</think>": 6}.get, tokenize=MODEL.tokenize)
    assert both.channels is None and both.think_open == 5
    half = Markers.find({**SPECIAL, "</think>": 6}.get, tokenize=MODEL.tokenize)
    assert half.channels is not None and half.think_close is None


def test_what_ends_thinking():
    assert hand_over(MARKERS, "thought", [W], [V]) == [W, *CLOSING]
    assert hand_over(MARKERS, "thought", [W], [], header=[]) == CLOSING[1:]
    assert hand_over(MARKERS, "answer", [W], [], header=[START, ASSISTANT, CHANNEL]) == [FINAL, MESSAGE]
    assert hand_over(MARKERS, "thought", [W], [], header=[START, ROLE_USER]) == CLOSING[1:]
    assert text_after(MODEL.template, MARKERS.think_close_text) == ""


# ---------------------------------------------------------------- whole replies


POLICIES = ["zoomr", "recency", "full"]


def reply(script, max_tokens=400, limits=ThinkingLimits(), policy="zoomr", look=lambda engine, event: None, **more):
    """(events, tokens) of one turn."""
    with talking(policy, model=HarmonyModel(), **more) as engine:
        talk = Conversation(engine.model, engine)
        events = say(talk, words(5), script, max_tokens, limits, look=lambda event: look(engine, event))
        return events, [e.token for e in of(TokenDecoded, events)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("summaries", ["extractive", "prompted", "off"])
def test_texts_have_no_markers(policy, summaries):
    events, _ = reply([*THINK, *words(60), *CLOSING, W, V, RETURN], policy=policy, summaries=summaries)
    done = events[-1]
    assert done.reason == "stop" and done.content == " w12 w13" and done.thinking_cut is None
    assert done.reasoning.startswith(" w12 w13") and not any(mark in done.reasoning for mark in ("<|", "analysis", "final", "assistant"))
    shown = "".join(e.text for e in of(TokenDecoded, events) if e.role == "answer")
    assert shown == done.content and all(e.text == "" for e in of(TokenDecoded, events) if e.role == "marker")


@pytest.mark.parametrize("into", range(4))
def test_thinking_that_ends_in_a_prompted_summary_closes_it(into):
    """The model ends its message while the runtime's summary is open; what is written of it stays reasoning."""
    text = [*words(40), *words(into), *CLOSING, W, V, RETURN]
    events, tokens = reply([*THINK, *text], summaries="prompted", thought_min=16, summary_max=30, budget=400)
    assert len(of(TokenInjected, events)) > 3, "a summary was opened"
    assert events[-1].content == " w12 w13" and "<|" not in events[-1].reasoning and tokens[-8:] == [*CLOSING, W, V]
    kept = [e.summary for e in of(BlockClosed, events) if e.summary is not None]
    assert len(kept) == 1 and kept[0][1] - kept[0][0] == events[-1].cache.injected_tokens + written_in_summary(events) + 1


def written_in_summary(events):
    return sum(e.role == "summary" for e in of(TokenDecoded, events))


def test_an_end_behind_the_answer_is_the_replys():
    events, tokens = reply([*OWN, W, END, START, ASSISTANT, *OWN, V])
    assert tokens == [*OWN, W] and events[-1].content == " w12" and events[-1].reason == "stop"


def test_a_budget_hands_over_with_the_models_own_headers():
    sentence = MODEL.tokenize(SENTENCE)
    events, tokens = reply([*THINK, *words(20), W, RETURN], limits=ThinkingLimits(20))
    assert tokens == [*THINK, *words(20), *sentence, *CLOSING, W] and events[-1].content == " w12"
    assert events[-1].thinking_cut == "budget" and [e.thinking_tokens for e in of(ThinkingCut, events)] == [20]
    assert not of(ThinkingCut, reply([*THINK, *words(20), *CLOSING, W], limits=ThinkingLimits(21))[0])


def test_nothing_is_cut_while_a_header_is_written():
    """Asked for at any token: in a header it waits for what the header says."""
    for at in range(16):
        def look(engine, event, at=at):
            if isinstance(event, TokenDecoded) and event.position - len(engine.generation.prompt) == at:
                engine.answer_now()

        events, tokens = reply([*THINK, W, V, END, START, ASSISTANT, *THINK, W, *CLOSING, V], look=look)
        text = "".join(MODEL.piece(t).decode() for t in tokens)
        assert text.count("<|message|>") == text.count("<|channel|>") and "<|start|><|start|>" not in text, at
        assert by_text(text) == (events[-1].reasoning, events[-1].content), at


@pytest.mark.parametrize("script, rest", [
    ([*THINK, W], [*MODEL.tokenize(SENTENCE), *CLOSING]), ([*THINK, W, END], CLOSING[1:]), ([*THINK, W, END, START, ASSISTANT], OWN),
    ([*THINK, W, END, START, ASSISTANT, CHANNEL, COMMENTARY], CLOSING[1:]),
])  # fmt: skip
def test_a_reply_that_ends_before_its_answer_is_asked_for_one(script, rest):
    events, tokens = reply([*script, RETURN, W])
    assert tokens[: len(script) + len(rest)] == [*script, *rest] and events[-1].thinking_cut == "ended"


def test_an_answer_alone_is_never_cut():
    events, tokens = reply([*OWN, *words(40)], limits=ThinkingLimits(0))
    assert tokens == [*OWN, *words(40)] and events[-1].thinking_cut is None and events[-1].reasoning == ""


def test_a_schema_holds_the_answer_alone(monkeypatch):
    class Held:
        def __init__(self):
            self.drawn = []

        def sample(self, sampler, context):
            self.drawn.append(sampler.sample(context))
            return self.drawn[-1]

    ScriptedSampler.script, held = [*THINK, W, *CLOSING, V, JSON], Held()
    text = Reply(MODEL, PROMPT, SamplingParams(), ScriptedSampler(MODEL), LearnedDialect(MARKERS, PROMPT), held)
    while text.sample(None) is not None:
        pass
    assert held.drawn == [V, JSON, RETURN] and text.content == " w13json" and LlamaSampler is not ScriptedSampler


# ---------------------------------------------------------------- a conversation


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("script", [
    [*THINK, *words(30), *CLOSING, W, V], [*THINK, *words(9), END, START, ASSISTANT, *THINK, *words(40), *CLOSING, W, V], [*OWN, W, V],
    [*THINK, *CLOSING, W, V], [*THINK, *words(90), *CLOSING, *words(5)],
])  # fmt: skip
def test_old_thinking_leaves_what_the_template_writes(policy, script):
    with talking(policy, budget=400, model=HarmonyModel()) as engine:
        talk, model = Conversation(engine.model, engine), engine.model
        say(talk, words(5), [*script, RETURN], 300)
        written = model.tokenize(model.render([*talk.messages, {"role": "user", "content": "w30 w31"}]))
        say(talk, [30, 31], [*OWN, W, RETURN], 20)
        g = engine.generation
        gone = {p for b in g.timeline.blocks if policy == "zoomr" and g.cache.forgotten()[b.number] for p in range(*b.detail)}
        left = [t for p, t in enumerate(g.timeline.tokens) if p not in gone and (policy == "zoomr" or p in engine.context.cells)]
        assert left == [*written, *OWN, W] and talk.again is None
        assert not any(p in engine.context.cells for p in gone)


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_reply_that_was_stopped_anywhere_is_closed_before_the_next_question(cut):
    script = [*THINK, *words(6), *CLOSING, W, V, W]
    with talking(budget=400, model=HarmonyModel()) as engine:
        talk = Conversation(engine.model, engine)
        say(talk, words(5), script, cut)
        before = len(engine.sequence)
        say(talk, [30, 31], [*OWN, W, RETURN], 20)
        text = "".join(engine.model.piece(t).decode() for t in engine.sequence[before:])
        assert text.count("<|start|>assistant<|channel|>final<|message|> w12") == 1
        whole = "".join(engine.model.piece(t).decode() for t in engine.sequence)
        first, question, _ = whole.partition("<|start|>user<|message|> w30 w31")
        assert question and first.endswith("<|end|>") and first.count("<|channel|>final<|message|>") == 1, whole


def test_the_modes_know_that_it_thinks():
    from zoomr_local.dialects import resolve

    assert resolve("auto", MARKERS) == ("extractive", "no markers for summaries (it marks its thinking); blocks are indexed by their own keys")
    assert resolve("prompted", MARKERS)[0] == "prompted" and isinstance(Summaries().dialect(MARKERS, PROMPT), LearnedDialect)
    assert GREEDY == SamplingParams()
