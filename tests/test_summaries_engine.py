"""Prompted and extractive blocks on the real library, in a small budget. The text is forced, as it is another one on another
machine; keys, cells, pages and the runtime's own tokens are real."""

from dataclasses import replace

import pytest

from scripted import ScriptedSampler

from zoomr_local import generation, session_files
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.events import BlockClosed, Finished, PagedOut, TokenDecoded, TokenInjected
from zoomr_local.sampling import SamplingParams
from zoomr_models.tasks import generate

BUDGET = 288


@pytest.fixture(scope="module")
def prompt(model):
    problem = generate("series", 1, seed=5, thoughts=5, split="dev")[0]
    return model.tokenize(model.render([{"role": "user", "content": problem.prompt}]))


def script(model):
    """Seven paragraphs of thinking, and an answer of two."""
    def tokens(text):
        return model.llama.tokenize(text, add_special=False, parse_special=False)

    paragraph = [*20 * tokens(" and"), *tokens(". So it is x[1] = 2"), *tokens(".\n\n")]
    return [*7 * paragraph, model.markers.think_close, *2 * paragraph]


def opened(model, mode):
    config = EngineConfig(kv_budget=BUDGET, threads=1, kv_ram=1 << 22, kv_disk=0, summaries=mode, thought_min=16, summary_max=8)
    return Engine(model, config)


def told(event):
    return replace(event, prefill_seconds=0, decode_seconds=0) if isinstance(event, Finished) else event


@pytest.mark.parametrize("mode", ["prompted", "extractive"])
def test_blocks_of_a_model_not_trained_for_it(model, prompt, mode, tmp_path, monkeypatch):
    """Saved and loaded where the runtime is opening a summary, and after the first block left the cache."""
    monkeypatch.setattr(session_files, "sync", lambda file: None)
    monkeypatch.setattr(generation, "LlamaSampler", ScriptedSampler)
    ScriptedSampler.script = text = script(model)
    engine, events, saved = opened(model, mode), [], {}
    for event in engine.generate(prompt, SamplingParams(), 2000):
        events.append(told(event))
        assert engine.context.n_used() <= BUDGET
        paged = any(isinstance(e, PagedOut) for e in events)
        for name, due in (("opening", isinstance(event, TokenInjected)), ("paged", paged and isinstance(event, TokenDecoded))):
            if due and name not in saved:
                engine.save(tmp_path / name)
                saved[name] = len(events)
    engine.close()
    done, blocks = events[-1], [e for e in events if isinstance(e, BlockClosed)]
    injected = [e for e in events if isinstance(e, TokenInjected)]
    written = [e for e in events if isinstance(e, TokenDecoded)]
    assert done.cache.summaries == mode and done.cache.injected_tokens == len(injected) and done.completion_tokens == len(written)
    assert [e.position for e in events if isinstance(e, TokenDecoded | TokenInjected)] == list(range(len(prompt), len(prompt) + len(written) + len(injected)))
    assert [e.token for e in written] == text and all(e.role == "summary" for e in injected) and "Summary of this step" not in done.content
    first_answer = next(e.position for e in written if e.role == "answer")
    if mode == "prompted":
        assert done.cache.prompted_summaries >= 2 and done.reasoning.count("[Summary of this step:") == done.cache.prompted_summaries
        assert max(e.position for e in injected) < first_answer and any(b.summary for b in blocks)
    else:
        assert not injected and len(blocks) >= 3 and not any(b.summary for b in blocks)
    assert done.cache.page_outs and done.cache.resident_peak_tokens <= BUDGET
    assert set(saved) == ({"opening", "paged"} if mode == "prompted" else {"paged"})
    for name, at in saved.items():
        engine = opened(model, mode)
        engine.load(tmp_path / name)
        assert [told(event) for event in engine.resume()] == events[at:], name
        engine.close()
