"""The main model families, each small and with random weights on its real vocabulary and template, as a user meets them.

What llama.cpp ships decides which: the vocabularies of Qwen 2, Llama 3, Phi 3, Command R, Gemma 4 and GPT 2. Qwen3's and
R1-Distill's are those of Qwen 2 and Llama 3 with the tokens that they added, at their real ids. gpt-oss' own is not
among them; its special tokens stand behind GPT 2's here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import vocabulary_models
from vocabulary_models import CONTROL, USER_DEFINED, int_value

from zoomr_cli.main import main
from zoomr_local.conversation import following_text
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.events import Finished, TokenDecoded, TokenInjected
from zoomr_local.model import Model
from zoomr_local.sampling import SamplingParams
from zoomr_local.thinking import CLOSING, ThinkingLimits, hand_over

BUDGET = 192
RANDOM = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)
HARMONY = ("<|startoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>")
GPT2_TOKENS = 50257


@dataclass(frozen=True)
class Family:
    """``template``: a file of llama.cpp's, None for the vocabulary's own or none. ``tokens``: what the family added, by id.

    ``thinking``: what `zoomr models show` says of it; ``opens``: what its model writes to begin a thought that its prompt did not begin.
    """

    arch: str
    vocabulary: str
    template: str | None
    thinking: str | None = None
    opens: str = ""
    tokens: dict[int, tuple[str, int]] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    ends: str = ""


FAMILIES = {
    "qwen2.5": Family("qwen2", "qwen2", "Qwen-Qwen2.5-7B-Instruct", ends="<|im_end|>", values={"eos": 151645}),
    "qwen3": Family(
        "qwen3", "qwen2", "Qwen-Qwen3-0.6B", "<think> ... </think>", "<think>\n", ends="<|im_end|>", values={"eos": 151645},
        tokens={151667: ("<think>", USER_DEFINED), 151668: ("</think>", USER_DEFINED)},
    ),
    "llama-3.1": Family("llama", "llama-bpe", "meta-llama-Llama-3.1-8B-Instruct", ends="<|eot_id|>", values={"eos": 128009}),
    "r1-distill-llama": Family(
        "llama", "llama-bpe", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "<think> ... </think>", ends="<｜end▁of▁sentence｜>",
        tokens={
            128000: ("<｜begin▁of▁sentence｜>", CONTROL), 128001: ("<｜end▁of▁sentence｜>", CONTROL), 128011: ("<｜User｜>", USER_DEFINED),
            128012: ("<｜Assistant｜>", USER_DEFINED), 128013: ("<think>", USER_DEFINED), 128014: ("</think>", USER_DEFINED),
        },
    ),
    "phi-3.5": Family("phi3", "phi-3", "microsoft-Phi-3.5-mini-instruct", ends="<|end|>", values={"eos": 32007}),
    "command-r": Family("command-r", "command-r", None, ends="<|END_OF_TURN_TOKEN|>"),
    "gemma-4": Family("gemma4", "gemma-4", None, "<|channel> ... <channel|>", "<|channel>thought\n", ends="<turn|>"),
    "gpt-2": Family("gpt2", "gpt-2", None, ends="<|endoftext|>"),
    "gpt-oss": Family(
        "gpt-oss", "gpt-2", "openai-gpt-oss-120b",
        "<|channel|>analysis<|message|> ... <|end|><|start|>assistant<|channel|>final<|message|>", "<|channel|>analysis<|message|>",
        ends="<|return|>", tokens={GPT2_TOKENS + i: (text, CONTROL) for i, text in enumerate(HARMONY)}, values={"eos": GPT2_TOKENS + 1},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, llama_models, tmp_path_factory):
    """(family, its model's file)."""
    family = FAMILIES[request.param]
    vocabulary = vocabulary_models.read_vocabulary(llama_models / f"ggml-vocab-{family.vocabulary}.gguf")
    values = {f"tokenizer.ggml.{name}_token_id": int_value(number) for name, number in family.values.items()}
    template = None if family.template is None else (llama_models / "templates" / f"{family.template}.jinja").read_text()
    path = tmp_path_factory.mktemp("family") / f"{request.param}.gguf"
    vocabulary_models.write_model(path, family.arch, vocabulary.changed(family.tokens, **values), template)
    yield family, path
    path.unlink()


@pytest.fixture(scope="module")
def opened(made):
    """(family, model)."""
    family, path = made
    model = Model.open(path)
    yield family, model
    model.close()


def ask(family: Family, model: Model, text: str) -> list[int]:
    """The prompt of ``text``, with a thought begun if the family thinks."""
    return model.tokenize(model.render([{"role": "user", "content": text}]) + family.opens)


def test_show_says_what_it_is(made, capsys):
    family, path = made
    assert main(["models", "show", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["dialect"], found["thinking"]) == (family.arch, "extractive", family.thinking)
    assert ("it marks its thinking" in found["dialect_why"]) is (family.thinking is not None)
    assert (found["template"] is None) is (family.arch == "gpt2") and found["pageable"] is True and found["refused"] is None
    assert (found["layers"], found["heads"], found["kv_heads"], found["head_dim"]) == (2, 2, 1, 32)
    assert found["window_tokens"] == (64 if family.arch in ("gemma4", "gpt-oss") else 0)
    assert found["vocabulary"] > 32_000 and found["kv_token_bytes"] > 0


def test_its_template_and_markers_are_read(opened):
    family, model = opened
    text = "What is 6 · 7? ¿Y en español? 漢字"
    prompt = model.render([{"role": "user", "content": text}])
    assert text in prompt and model.llama.is_eog(model.llama.token_of(family.ends))
    written = b"".join(model.llama.piece(t, special=True) for t in model.tokenize(prompt)).decode()
    assert "".join(written.split()).endswith("".join(prompt.split())), "some vocabularies strip or add spaces beside special tokens"
    engine = Engine(model, EngineConfig(kv_budget=BUDGET, threads=1))
    assert engine.summaries.dialect(model.markers, ask(family, model, text)).role == ("thought" if family.thinking else "answer")
    engine.close()
    if model.llama.chat_template() is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
        after = following_text(model, turns)
        assert after is not None and after.rstrip().endswith(prompt.rpartition(text)[2].strip()) and "c" in after


def run(model: Model, prompt: list[int], policy: str, limits: ThinkingLimits, max_tokens: int):
    """(events, the most cells that were in use) of one reply; ends of the model's own are taken as words."""
    engine = Engine(model, EngineConfig(policy=policy, kv_budget=BUDGET, thought_min=16, threads=1))
    used, events = 0, []
    for event in engine.generate(prompt, RANDOM, max_tokens, limits=limits):
        used = max(used, engine.context.n_used())
        events.append(event)
    engine.close()
    return events, used


def texts_of(model: Model, events, roles) -> str:
    """The obvious way: all bytes of a role at once."""
    pieces = (model.llama.piece(e.token) for e in events if isinstance(e, (TokenDecoded, TokenInjected)) and e.role in roles)
    return b"".join(pieces).decode("utf-8", "replace")


@pytest.mark.parametrize("policy", ["zoomr", "full"])
def test_a_reply_is_paged_inside_the_budget_and_split_at_its_thinking(opened, policy):
    family, model = opened
    prompt = ask(family, model, " ".join(f"Line {i} says {i * i}." for i in range(20)))
    limits = ThinkingLimits(100, loops=False)
    events, used = run(model, prompt, policy, limits, 180)
    done = events[-1]
    assert isinstance(done, Finished) and done.reason in ("stop", "length") and done.completion_tokens > 20
    for text, roles in ((done.content, ("answer",)), (done.reasoning, ("thought", "summary"))):
        assert text == texts_of(model, events, roles)
    if family.thinking is None:
        assert done.reasoning == "" and done.thinking_cut is None
    else:
        decoded, closing = [e for e in events if isinstance(e, TokenDecoded)], hand_over(model.markers, "thought", [], [])
        at = next(i for i in range(len(decoded)) if [e.token for e in decoded[i : i + len(closing)]] == closing)
        assert all(e.role == "marker" and e.text == "" for e in decoded[at : at + len(closing)])
        assert done.thinking_cut in ("budget", "ended") and CLOSING.strip() in done.reasoning and CLOSING.strip() not in done.content
    if policy == "zoomr":
        assert used <= BUDGET and done.cache.resident_peak_tokens <= BUDGET < len(prompt) + done.completion_tokens
        assert done.cache.blocks > 0 and done.cache.page_outs > 0 and done.cache.dropped_tokens == 0
