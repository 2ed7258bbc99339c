"""Models are refused by name and with a reason, or served; files that are not models are said to be so."""

import numpy as np
import pytest
from conftest import config, prompt_op, random_tokens, replay

import zoomr_local.libllama as libllama
from zoomr_local.errors import EngineError, ModelError, UnsupportedModel

REFUSED = {"mamba": "recurrent", "mrope": "M-RoPE", "longrope": "LongRoPE"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_not_shown_exact_is_refused_by_name(name, models):
    model = models(name)
    assert model.support().startswith(REFUSED[name])
    with pytest.raises(UnsupportedModel, match=f"tiny-{name}.gguf .*cannot be paged. {REFUSED[name]}.*--policy full"):
        libllama.LlamaContext(model, **config("f16-fa"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_runs_without_paging(name, models):
    with libllama.LlamaContext(models(name), paging=False, **config("f16-fa")) as context:
        logits = replay(context, [prompt_op(20)])
        assert np.isfinite(logits).all()
        assert context.n_used() == (0 if name == "mamba" else 20)
        assert context.token_bytes == (0 if name == "mamba" else 2 * 2 * 2 * 64 * models(name).n_layer)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_what_was_shown_exact_is_served(name, models):
    assert models(name).support() is None


@pytest.mark.parametrize("make, message", [
    (lambda p: None, "cannot be read: No such file"),
    (lambda p: p.write_bytes(b""), "not a GGUF file"),
    (lambda p: p.write_bytes(b"hello world"), "not a GGUF file"),
    (lambda p: p.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 40), "cannot be loaded: "),
])
def test_files_that_are_no_models(make, message, tmp_path):
    path = tmp_path / "broken.gguf"
    make(path)
    with pytest.raises(ModelError, match=message):
        libllama.LlamaModel(path)


def test_a_truncated_model_is_said_to_be_one(paths, tmp_path):
    whole = paths["llama"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ModelError, match="cut.gguf cannot be loaded: .+"):
        libllama.LlamaModel(tmp_path / "cut.gguf")


def test_a_models_facts(models, paths):
    model = models("llama")
    assert (model.arch, model.n_layer, model.n_head, model.n_head_kv, model.n_embd) == ("llama", 3, 4, 2, 128)
    assert (model.n_vocab, model.n_ctx_train, model.bos_token, model.eos_token, model.add_bos) == (320, 4096, 1, 2, True)
    assert model.n_params == 598912 and model.size_bytes == 4 * model.n_params
    assert model.meta("llama.block_count") == "3" and model.meta("no.such.key") is None
    assert model.metadata()["general.architecture"] == "llama"
    assert model.chat_template() is None


def test_the_tokenizer(models):
    model = models("llama")
    ids = model.tokenize("<|begin_of_thought|>hé", add_special=True, parse_special=True)
    assert ids == [1, 259, 3 + ord("h"), 3 + 0xC3, 3 + 0xA9]
    assert b"".join(model.piece(i) for i in ids) == "hé".encode()
    assert model.piece(259, special=True) == b"<|begin_of_thought|>" and model.piece(259) == b""
    assert len(model.tokenize("<|begin_of_thought|>", add_special=False, parse_special=False)) == 20
    assert model.token_of("<|end_of_thought|>") == 260
    assert model.token_of("hé") is None and model.token_of("") is None
    assert model.is_eog(2) and not model.is_eog(259)
    assert len(model.tokenize(b"a" * 5000, add_special=False, parse_special=True)) == 5000
    with pytest.raises(ModelError, match="token 999"):
        model.piece(999)


def test_a_full_cache_is_an_error_and_stays_usable(models):
    with libllama.LlamaContext(models("llama"), **config("f16-fa")) as context:
        replay(context, [prompt_op(250)])
        with pytest.raises(EngineError, match=r"no free cells .*10 tokens, 250 of 256 cells"):
            context.decode(random_tokens(10), range(250, 260))
        assert context.n_used() == 250
        context.page_free(0, 0, 100)
        context.decode(random_tokens(10), range(250, 260))


def test_wrong_batches_are_errors(models):
    with libllama.LlamaContext(models("llama"), **config("f16-fa", n_seq_max=2)) as context:
        for seq in (-1, 2):
            with pytest.raises(EngineError, match="sequence"):
                context.decode([5], [0], seq=seq)
        with pytest.raises(EngineError, match="sequence"):
            context.decode_batch([5], [0], [2], [True])
        with pytest.raises(EngineError, match="at most"):
            context.decode([], [])
        with pytest.raises(EngineError, match="at most"):
            context.decode([5] * 1000, range(1000))
        with pytest.raises(EngineError, match="2 tokens with 3 positions"):
            context.decode([5, 6], [0, 1, 2])
        with pytest.raises(EngineError, match="invalid batch"):
            context.decode([100000], [0])
        with pytest.raises(EngineError, match="part of a sequence"):
            context.seq_cp(0, 1, 0, 5)
        context.decode([5], [0], logits="none")
        with pytest.raises(EngineError, match="no logits"):
            context.logits()
        with pytest.raises(EngineError, match="no logits"):
            libllama.LlamaSampler(models("llama"), temperature=0).sample(context)
        with pytest.raises(EngineError, match="invalid batch"):
            context.decode([5], [7])  # a gap after the newest token
    with pytest.raises(EngineError, match="closed"):
        context.decode([5], [0])
    with pytest.raises(EngineError, match="closed"):
        context.scores()


def test_wrong_context_arguments_are_errors(models):
    for wrong in ({"n_cells": 0}, {"n_cells": 256, "n_batch": 0}, {"n_cells": 256, "n_seq_max": 0}):
        with pytest.raises(EngineError, match="needs at least 1 cell"):
            libllama.LlamaContext(models("llama"), **wrong)
    with pytest.raises(EngineError, match="type_k='f12'"):
        libllama.LlamaContext(models("llama"), n_cells=256, type_k="f12")
    with pytest.raises(EngineError, match="made no context of 256 cells: .*(V cache|flash_attn|FLASH)"):
        libllama.LlamaContext(models("llama"), n_cells=256, type_v="q8_0", flash_attn=False)


def test_cells_are_rounded_up_and_said(models):
    with libllama.LlamaContext(models("llama"), n_cells=300, n_seq_max=2) as context:
        assert context.n_cells == 512
        assert context.token_bytes == 3 * 2 * 2 * 64 * 2


def test_samplers(models):
    """Greedy is argmax; a seed decides a draw; a penalty makes an accepted token less likely."""
    model = models("llama")
    with libllama.LlamaContext(model, **config("f16-fa")) as context:
        replay(context, [prompt_op(20)])
        best = int(np.argmax(context.logits()))
        assert libllama.LlamaSampler(model, temperature=0).sample(context) == best
        draw = lambda seed: [libllama.LlamaSampler(model, temperature=1.0, top_k=50, top_p=0.95, min_p=0.01,  # noqa: E731
                                                   seed=seed).sample(context) for _ in range(1)]
        assert draw(1) == draw(1)
        assert len({draw(seed)[0] for seed in range(40)}) > 3
        top = set(np.argsort(context.logits())[-3:].tolist())
        sampler = libllama.LlamaSampler(model, temperature=5.0, top_k=3, seed=3)
        assert {sampler.sample(context) for _ in range(60)} == top
        penalised = libllama.LlamaSampler(model, temperature=0, repeat_penalty=1e6, repeat_last_n=8)
        penalised.accept(best)
        assert penalised.sample(context) != best
        penalised.reset()
        assert penalised.sample(context) == best


def test_closing_the_model_closes_its_contexts(paths):
    model = libllama.LlamaModel(paths["llama"])
    context = libllama.LlamaContext(model, **config("f16-fa"))
    model.close()
    model.close()
    with pytest.raises(EngineError, match="closed"):
        context.decode([5], [0])
    with pytest.raises(ModelError, match="closed"):
        model.tokenize("a", add_special=False, parse_special=False)


def test_a_truncated_file_is_named_with_the_cause(paths, tmp_path):
    whole = paths["llama"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cut.gguf cannot be loaded: tensor .* not within the file bounds"):
        libllama.LlamaModel(tmp_path / "cut.gguf")
