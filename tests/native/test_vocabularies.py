"""Text to tokens and back with the real vocabularies that llama.cpp ships, against its own expectations."""

from __future__ import annotations

import sys

import pytest
import vocabulary_models
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(ROOT))

import zoomr_local.libllama as libllama  # noqa: E402
from benchmarks.make_model import byte_alphabet  # noqa: E402

ENCODERS = ("bert-bge", "nomic-bert-moe")  # no models that generate, and their vocabularies do not keep a text whole
GENERATORS = (
    "aquila", "baichuan", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "gpt-neox", "llama-bpe",
    "llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
BETWEEN = "\n__ggml_vocab_test__\n"  # what llama.cpp puts between two texts of a .inp file
HARD = ("", " ", "\n\n\t \r\n", "\0", "a\u0301\u0327", "e\u200d\u2014\u202e", "\U0001f469\u200d\U0001f4bb\U0001f3f3\ufe0f", "漢字かなカナ한글", "مرحبا שלום",
        "\ufffe\uffff\U0010ffff", "½²Ⅷ ١٢٣", "x" * 500, "  def f(x):\n        return x  # \t", "<think> [INST] <|im_end|> </s> <0x0A> [PAD151646]")  # fmt: skip
LOST = "▁"  # stands for a space in these, so that it comes back as one
WITH_LOST = ("llama-spm", "phi-3", "baichuan", "gemma-4")


@pytest.fixture(scope="module", params=GENERATORS)
def loaded(request, llama_models, tmp_path_factory):
    """(name, vocabulary, model): metadata and tokenizer alone are used, so that any architecture does around them."""
    name = request.param
    vocabulary = vocabulary_models.read_vocabulary(llama_models / f"ggml-vocab-{name}.gguf")
    path = tmp_path_factory.mktemp("vocabulary") / f"{name}.gguf"
    vocabulary_models.write_model(path, "llama", vocabulary)
    with libllama.LlamaModel(path, no_alloc=True) as model:
        yield name, vocabulary, model
    path.unlink()


def back(model, tokens) -> str:
    return b"".join(model.piece(token, special=True) for token in tokens).decode("utf-8", "replace")


def unwritten(vocabulary) -> frozenset[int]:
    """The bytes that a byte-level vocabulary has no token for; empty for the others, which have tokens such as <0xF1>."""
    if vocabulary.values["tokenizer.ggml.model"] != vocabulary_models.text_value("gpt2"):
        return frozenset()
    known = set(vocabulary.tokens)
    return frozenset(byte for byte, letter in enumerate(byte_alphabet()) if letter.encode() not in known)


def comes_back(name: str, model, text: str) -> None:
    text = text.replace(LOST, " ") if name in WITH_LOST else text
    for parse_special in (False,) if name in WITH_LOST else (False, True):
        found = back(model, model.tokenize(text, add_special=False, parse_special=parse_special))
        # these put a space before a text and behind a special token, as a first word is written like any other
        assert found == text or (name in WITH_LOST and found == " " + text), (text, parse_special)


def test_every_vocabulary_is_looked_at(llama_models):
    there = {path.name.removeprefix("ggml-vocab-").removesuffix(".gguf") for path in llama_models.glob("ggml-vocab-*.gguf")}
    assert there == {*GENERATORS, *ENCODERS}


def test_llama_cpp_expects_the_same_tokens(loaded, llama_models):
    name, _, model = loaded
    given_texts = llama_models / f"ggml-vocab-{name}.gguf.inp"
    if not given_texts.is_file():
        assert name in ("aquila", "baichuan", "gpt-neox"), "llama.cpp has no expectations for these"
        return
    texts = given_texts.read_bytes().decode().split(BETWEEN)
    expected = [[int(word) for word in line.split()] for line in given_texts.with_suffix(".out").read_text().splitlines()]
    assert len(texts) >= len(expected) > 30
    for text, tokens in zip(texts, expected):
        assert model.tokenize(text, add_special=False, parse_special=False) == tokens, text


def test_any_text_comes_back(loaded):
    name, vocabulary, model = loaded
    lacks = unwritten(vocabulary)
    rare = {*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)} - set(b"\t\n\r")
    assert lacks <= rare, "no more than control characters and what Unicode has not assigned"
    for text in HARD:
        if not lacks & set(text.encode()):
            comes_back(name, model, text)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def random_texts(text):
        comes_back(name, model, "".join(c for c in text if not lacks & set(c.encode())))

    random_texts()


def test_control_tokens_are_not_read_from_a_text(loaded):
    _, vocabulary, model = loaded
    control = [(text.decode(), i) for text, i in vocabulary.special.items() if vocabulary.types[i] == vocabulary_models.CONTROL]
    assert control or set(vocabulary.types) <= {1}, "every vocabulary has some, or says nothing of types"
    for text, token in control[:40]:
        plain = model.tokenize(text, add_special=False, parse_special=False)
        assert token not in plain, text
        assert model.tokenize(f"a{text}b", add_special=False, parse_special=True).count(token) == 1, text
        assert model.piece(token) == b"", "it is no text"
