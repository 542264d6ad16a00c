"""Texts that are tokenised together and in parts have the ids that the tokenizer gives each of them alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data import encoding
from lorasmith.engine.data.encoding import BetweenMarks, WholeTexts, encoder_of
from lorasmith.engine.data.rendering import encode
from lorasmith.starter.location import starter_model
from tests.engine.chat_templates import SHAPES, shaped_tokenizer

TOKENIZERS = {name: shaped_tokenizer(starter_model(), shape)[0] for name, shape in SHAPES.items()}
WORDS = ["", " ", "\n", "\n\n", "  x", "don't", "é世界🙂", "<|", "|>", "12345", "def f():\n\t", "\u00a0", "a" * 50]


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_texts_between_added_tokens_are_tokenised_on_their_own(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    marks = [token.content for token in tokenizer.added_tokens_decoder.values()]
    words = st.lists(st.sampled_from([*WORDS, *marks]) | st.text(max_size=5), max_size=12).map("".join)
    texts = data.draw(st.lists(words, min_size=1, max_size=5))
    encoder = encoder_of(tokenizer)
    assert isinstance(encoder, BetweenMarks)
    assert encoder.encode(texts) == [encode(tokenizer, text) for text in texts]
    assert encoder.encode(texts[::-1]) == [encode(tokenizer, text) for text in texts[::-1]]  # from what it remembers


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", 100)
    tokenizer = TOKENIZERS["chatml"]
    encoder = BetweenMarks(tokenizer)
    for number in range(50):
        text = f"number {number}<|im_end|> and {number}"
        assert encoder.encode([text]) == [encode(tokenizer, text)]
        assert encoder.characters < 150


def bare() -> Any:
    return AutoTokenizer.from_pretrained(starter_model())


def metaspace() -> Any:
    tokenizer = bare()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def prefix_space() -> Any:
    tokenizer = bare()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def prepending() -> Any:
    tokenizer = bare()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_")])
    return tokenizer


def greedy_token() -> Any:
    tokenizer = bare()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    return tokenizer


def normalized_token() -> Any:
    tokenizer = bare()
    tokenizer.add_tokens([AddedToken("<mask>", normalized=True)])
    return tokenizer


@pytest.mark.parametrize("make", [metaspace, prefix_space, prepending, greedy_token, normalized_token])
def test_a_tokenizer_that_looks_further_is_given_whole_texts(make: Any) -> None:
    tokenizer: PreTrainedTokenizerBase = make()
    texts = ["a <mask> b<|im_end|>c", " x", "<|im_start|> y  <mask>z"]
    encoder = encoder_of(tokenizer)
    assert isinstance(encoder, WholeTexts)
    assert encoder.encode(texts) == [encode(tokenizer, text) for text in texts]


def test_truncation_and_padding_that_a_tokenizer_comes_with_are_not_used() -> None:
    tokenizer = bare()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    text = "one two three four five six<|im_end|>"
    ids = encoder_of(tokenizer).encode([text])
    assert ids == [encode(bare(), text)]
