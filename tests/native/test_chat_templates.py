"""The chat templates that llama.cpp ships: they render as ours, thinking is known by its markers, and a conversation goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zoomr_local.conversation import following_text
from zoomr_local.dialects import TABLE, Markers, Summaries
from zoomr_local.model import Model
from zoomr_local.thinking import hand_over, text_after

NEEDS_TOOLS = "fireworks-ai-llama-3-firefunction-v2"
NO_SYSTEM = "google-gemma-2-2b-it"
MARKS = [text for row in TABLE for text in (row.think_open, row.think_close)] + ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
SPLIT = re.compile("|".join(re.escape(text) for text in sorted(set(MARKS), key=len, reverse=True)))

THINK, MISTRAL, SEED = ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>")
COHERE, MINIMAX, GEMMA = ("<|START_THINKING|>", "<|END_THINKING|>"), ("<mm:think>", "</mm:think>"), ("<|channel>", "<channel|>")
HARMONY = ("<|channel|>", "<|message|>")

# template: markers, what a reply begins in, what stands between thinking and answer
FAMILIES = {
    "Qwen-Qwen3-0.6B": (THINK, "answer", "\n\n"), "Qwen3.5-4B": (THINK, "thought", "\n\n"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (THINK, "thought", ""), "llama-cpp-deepseek-r1": (THINK, "thought", ""),
    "deepseek-ai-DeepSeek-V3.1": (THINK, "answer", ""), "HuggingFaceTB-SmolLM3-3B": (THINK, "answer", ""),
    "GLM-4.6": (THINK, "answer", ""), "GLM-4.7-Flash": (THINK, "thought", ""), "Kimi-K2-Thinking": (THINK, "answer", ""),
    "NVIDIA-Nemotron-Nano-v2": (THINK, "thought", ""), "MiniMax-M2": (THINK, "thought", "\n\n"), "MiniMax-M3": (MINIMAX, "answer", ""),
    "mistralai-Ministral-3-14B-Reasoning-2512": (MISTRAL, "answer", ""), "ByteDance-Seed-OSS": (SEED, "answer", ""),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (COHERE, "answer", ""), "google-gemma-4-31B-it": (GEMMA, "answer", ""),
    "openai-gpt-oss-120b": (HARMONY, "answer", ""),
}  # fmt: skip
WITHOUT = ("google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct", "Qwen-Qwen2.5-7B-Instruct", "microsoft-Phi-3.5-mini-instruct")
NAMES = (*FAMILIES, *WITHOUT)

ASK = [{"role": "user", "content": "first question"}]
TALK = [*ASK, {"role": "assistant", "content": "an answer"}, {"role": "user", "content": "second question"}]


class Written:
    """What `Model.render` needs of a library: a template without a model. A token is a marker or a letter."""

    bos_token = eos_token = None
    add_bos = False

    def __init__(self, source: str) -> None:
        self.source = source
        self.marks = [text for text in dict.fromkeys(MARKS) if text in source]

    def chat_template(self):
        return self.source

    def piece(self, token, special=False):
        return "".join(written(self, [token])).encode()

    def meta(self, key):
        return None

    def token_of(self, text):
        return self.marks.index(text) if text in self.marks else None

    def tokenize(self, text, add_special=False, parse_special=False):
        found, at = [], 0
        for match in SPLIT.finditer(text) if parse_special else ():
            found += [1000 + ord(c) for c in text[at : match.start()]] + [self.marks.index(match[0])]
            at = match.end()
        return found + [1000 + ord(c) for c in text[at:]]


def read(folder: Path, name: str) -> Model:
    return Model(Path(name), Written((folder / "templates" / f"{name}.jinja").read_text()))


def test_every_template_renders(llama_models):
    names = sorted(path.stem for path in (llama_models / "templates").glob("*.jinja"))
    assert len(names) > 60 and {*NAMES, NEEDS_TOOLS} <= set(names)
    for name in names:
        if name != NEEDS_TOOLS:
            system = [] if name == NO_SYSTEM else [{"role": "system", "content": "be brief"}]
            model = read(llama_models, name)
            assert "first question" in model.render([*system, *ASK]), name
            assert all(text in model.render([*system, *TALK]) for text in ("first question", "an answer", "second question")), name


@pytest.mark.parametrize("name", FAMILIES)
def test_thinking_is_known_by_its_markers(name, llama_models):
    marks, role, between = FAMILIES[name]
    model = read(llama_models, name)
    markers, llama = model.markers, model.llama
    prompt = llama.tokenize(model.render(ASK), parse_special=True)
    assert markers.thinking and Summaries().dialect(markers, prompt).role == role
    if marks == HARMONY:
        assert markers.channels is not None and "".join(written(llama, markers.channels.answer_header)) in llama.source
    else:
        assert (markers.think_open, markers.think_close) == tuple(llama.token_of(text) for text in marks) and markers.channels is None
    assert text_after(llama.source, markers.think_close_text) == between
    ended = Summaries().dialect(markers, [*prompt, *hand_over(markers, "thought", [], llama.tokenize(between))])
    assert ended.role == "answer" and ended.header is None


def written(llama, tokens):
    return (llama.marks[t] if t < 1000 else chr(t - 1000) for t in tokens)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_that_does_not_think_only_answers(name, llama_models):
    model = read(llama_models, name)
    assert not model.markers.thinking and not model.markers.ends_thinking
    assert Summaries().dialect(model.markers, model.llama.tokenize(model.render(ASK), parse_special=True)).role == "answer"


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_goes_on_behind_its_answer(name, llama_models):
    model = read(llama_models, name)
    after = following_text(model, TALK)
    assert after is not None and after.count("second question") == 1 and "first question" not in after
    assert model.render(TALK).endswith(after) and after.endswith(model.render(ASK).rpartition("first question")[2])


def test_a_template_that_rewrites_earlier_turns_does_not_go_on(llama_models):
    model = read(llama_models, "Qwen-Qwen3-0.6B")
    model.llama.source = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    assert following_text(model, TALK) is None


def test_markers_of_no_model_are_markers_of_none():
    assert Markers.find(lambda text: None).channels is None and not Markers.find(lambda text: None, tokenize=list).thinking
