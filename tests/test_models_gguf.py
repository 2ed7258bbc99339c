"""The bundled GGUF under llama.cpp: same tokens, same numbers, and the keys a runtime reads."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import zoomr_local.libllama  # noqa: F401  llama_cpp below runs on its library, hooks off
import llama_cpp  # isort: skip
import zoomr_models as models
from zoomr_models import tasks, tokenizer

FIXTURE = json.loads(Path(__file__).with_name("test_models_fixture.json").read_text())
Q8_TOLERANCE = 1.0  # logits; measured differences are in models/zoomr-tiny.md


def _opened(name):
    loaded = llama_cpp.Llama(str(models.bundled_model_path(name)), n_ctx=4096, n_threads=1, n_gpu_layers=0, verbose=False)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def model():
    yield from _opened("zoomr-tiny")


@pytest.fixture(scope="module")
def plain():
    yield from _opened("plain-tiny")


def ids_of(model, text):
    return model.tokenize(text.encode(), add_bos=False, special=True)


def complete(model, prompt, limit=3900):
    out = ids_of(model, tasks.prompt_text(prompt))
    new = []
    for token in model.generate(out, temp=0.0, top_k=1, repeat_penalty=1.0):
        new.append(token)
        if token == tokenizer.IM_END or len(new) == limit:
            break
    return tokenizer.decode(new)


def test_size_and_metadata(model):
    assert all(models.bundled_model_path(name).stat().st_size < 10_000_000 for name in models.BUNDLED)
    meta = model.metadata
    assert meta["general.name"] == "zoomr-tiny"
    assert meta["tokenizer.ggml.pre"] == "gpt-2"
    for key in ("window", "zoomed_blocks", "vote_window", "summary_rows"):
        assert int(meta[f"zoomr.{key}"]) > 0
    assert meta["zoomr.votes_per_head"] == "0"


def test_chat_template_says_what_training_said(model):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(model.metadata["tokenizer.chat_template"], keep_trailing_newline=True)
    text = template.render(
        messages=[{"role": "user", "content": "What is oak?"}], add_generation_prompt=True
    )
    assert text == tasks.prompt_text("What is oak?")


def test_pinned_ids(model):
    for pinned in FIXTURE["ids"]:
        assert ids_of(model, pinned["text"]) == pinned["ids"], pinned["text"][:40]


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_same_ids_on_every_family(model, family):
    for problem in tasks.generate(family, 20, seed=11, thoughts=12, split="dev"):
        text = tasks.prompt_text(problem.prompt) + problem.trace
        assert ids_of(model, text) == tokenizer.encode(text)


def test_same_ids_on_arbitrary_utf8(model):
    rng = random.Random(5)
    ranges = ((32, 127), (160, 880), (0x400, 0x500), (0x3040, 0x30FF), (0x4E00, 0x9000), (0x1F300, 0x1F600))
    for _ in range(300):
        text = "".join(
            rng.choice((" ", "\n", "oak", "42", chr(rng.randrange(*rng.choice(ranges)))))
            for _ in range(rng.randrange(1, 40))
        )
        assert ids_of(model, text) == tokenizer.encode(text), repr(text)


def test_logits_agree_with_training_within_quantisation(model):
    model.reset()
    model.eval(FIXTURE["ids"][0]["ids"])
    got = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
    want = np.array(FIXTURE["logits"])
    assert np.abs(got - want).max() < Q8_TOLERANCE
    assert got.argmax() == want.argmax()


def test_demo_problems_are_test_problems_and_are_answered(model):
    lines = models.demo_problems_path().read_text().splitlines()
    demos = [json.loads(x) for x in lines]
    assert len(demos) == 8 and all(set(d) == {"id", "prompt", "answer"} for d in demos)
    for demo in demos:
        family = demo["id"].split("-")[0]
        assert tasks.split_of(family, demo["prompt"]) == "test"
    assert {demo["id"].split("-")[0] for demo in demos} == set(tasks.FAMILIES)
    right = 0
    for demo in demos[:4]:
        text = complete(model, demo["prompt"])
        right += text.endswith(f"The answer is {demo['answer']}.<|im_end|>")
        assert "<|begin_of_summary|>" in text
    assert right >= 3


def test_the_plain_model_thinks_without_summaries(plain):
    assert plain.metadata["general.name"] == "plain-tiny" and not [key for key in plain.metadata if key.startswith("zoomr.")]
    right = 0
    for family in sorted(tasks.FAMILIES):
        (problem,) = tasks.generate(family, 1, seed=12, thoughts=6, split="dev")
        text = complete(plain, problem.prompt)
        right += text.endswith(f"The answer is {problem.answer}.<|im_end|>")
        assert "</think>" in text and "summary" not in text
        written = tasks.prompt_text(problem.prompt) + problem.plain_trace
        assert ids_of(plain, written) == tokenizer.encode(written)
    assert right >= 3


def test_the_beacons_model_reads_what_only_beacons_hold():
    """By the engine, which decodes the beacons and drops what they stand for; token ids as in training."""
    from zoomr_local.beacon_generation import find_beacons
    from zoomr_local.engine import Engine, EngineConfig
    from zoomr_local.model import Model
    from zoomr_local.sampling import SamplingParams

    model = Model.open(models.bundled_model_path("breadcrumbs-tiny"))
    assert model.name == "breadcrumbs-tiny" and find_beacons(model).every == (8, 4, 16)
    engine = Engine(model, EngineConfig(policy="breadcrumbs", kv_budget=512))
    right = peak = written = 0
    for family in sorted(tasks.FAMILIES):
        for problem in tasks.generate(family, 2, seed=12, thoughts=6, split="dev"):
            tokens = model.tokenize(tasks.prompt_text(problem.prompt))
            assert tokens == tokenizer.encode(tasks.prompt_text(problem.prompt))
            *_, done = engine.generate(tokens, SamplingParams(), 1200)
            right += done.content.strip() == f"The answer is {problem.answer}."
            written, peak = written + done.completion_tokens, max(peak, done.cache.resident_peak_tokens)
            written_alone = tasks.prompt_text(problem.prompt) + problem.plain_trace
            assert model.tokenize(written_alone) == tokenizer.encode(written_alone)
    engine.close()
    model.close()
    assert right >= 6 and peak < 512 and written > 8 * 300
