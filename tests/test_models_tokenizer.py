"""The tokenizer: one token a word where the tasks need it, and every text comes back."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from zoomr_models import tasks, tokenizer
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import tasks, tokenizer

FIXTURE = Path(__file__).with_name("test_models_fixture.json")


@given(st.text())
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_every_task_word_and_number_is_one_token(family):
    for problem in tasks.generate(family, 10, seed=1, thoughts=10):
        text = problem.prompt + "".join(t.text + t.summary for t in problem.thoughts)
        for word in re.findall(r" ?[A-Za-z]+| ?[0-9]+", text):
            assert len(tokenizer.encode(word)) == 1, word


def test_numbers_to_99_are_one_token_with_and_without_space():
    for i in range(100):
        assert len(tokenizer.encode(f" {i}")) == 1
        assert len(tokenizer.encode(str(i))) == 1


def test_specials_are_one_token_each():
    for i, special in enumerate(tokenizer.SPECIALS):
        assert tokenizer.encode(special) == [i]
        assert tokenizer.decode([i]) == special


def test_pinned_ids():
    for pinned in json.loads(FIXTURE.read_text())["ids"]:
        assert tokenizer.encode(pinned["text"]) == pinned["ids"], pinned["text"][:40]


@given(st.text())
@settings(max_examples=150, deadline=None)
def test_same_ids_as_the_tokenizers_package(text):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.models.BPE(
        {t: i for i, t in enumerate(tokenizer.TOKENS)}, list(tokenizer.MERGES)
    )
    reference = tokenizers.Tokenizer(bpe)
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not any(s in text for s in tokenizer.SPECIALS):
        assert tokenizer.encode(text) == reference.encode(text).ids
