"""Texts that are cut into words have the ids that the tokenizer gives them whole."""

from __future__ import annotations

import json
import re
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data import words
from lorasmith.engine.data.encoding import BetweenMarks, encoder_of
from lorasmith.engine.data.rendering import encode
from lorasmith.engine.data.words import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    SMOLLM_PATTERN,
    Words,
    in_ascii,
    mark_of,
    word_pattern,
)
from lorasmith.starter.location import starter_model


def byte_level(*, use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split_by(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


CUTTING = {
    GPT2_PATTERN: byte_level(),
    SMOLLM_PATTERN: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
    LLAMA3_PATTERN: split_by(LLAMA3_PATTERN),
    QWEN2_PATTERN: split_by(QWEN2_PATTERN),
}


def cut_by(pieces: Any) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(starter_model())
    tokenizer.backend_tokenizer.pre_tokenizer = pieces
    return tokenizer


TOKENIZERS = {pattern: cut_by(pieces) for pattern, pieces in CUTTING.items()}
# One of each kind that a pattern tells apart, and what could be a letter, a digit or a space elsewhere
KINDS = ["a", "s", "S", "l", "1", "'", "_", " ", "\n", "\r", "\t", "\x1c"]


def words_of(pattern: str) -> Words:
    encoder = encoder_of(TOKENIZERS[pattern])
    assert isinstance(encoder, BetweenMarks)
    assert encoder.words is not None
    return encoder.words


@pytest.mark.parametrize("pattern", CUTTING, ids=["gpt-2", "smollm", "llama-3", "qwen-2"])
def test_python_cuts_ascii_where_the_tokenizer_does(pattern: str) -> None:
    every = [chr(code) for code in range(128)]
    texts = ["".join(some) for length in (1, 2, 3, 4) for some in product(KINDS, repeat=length)]
    texts += ["".join(pair) for pair in product(every, every)]
    texts += [f"{before}{one}{after}" for one in every for before in ("a", "1", " ", "\n") for after in ("a", "1", " ")]
    cut = re.compile(in_ascii(pattern), re.ASCII)
    for text in texts:
        pieces = [text[start:end] for _, (start, end) in CUTTING[pattern].pre_tokenize_str(text)]
        assert cut.findall(text) == pieces, repr(text)


@pytest.mark.parametrize("pattern", CUTTING, ids=["gpt-2", "smollm", "llama-3", "qwen-2"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_texts_have_the_same_ids_whole_and_in_words(pattern: str, data: st.DataObject) -> None:
    some = st.sampled_from(
        [*KINDS, "   ", "\n\n", "'ll", "don't", "def f(x):", "12345", "é", "世界", "\u00a0", "\u017f"]
    )
    texts = data.draw(st.lists(st.lists(some, max_size=12).map("".join), min_size=1, max_size=4))
    encoder = words_of(pattern)
    for given_texts in (texts, texts[::-1]):  # from what it remembers, too
        assert encoder.encode(given_texts) == [encode(TOKENIZERS[pattern], text) for text in given_texts]


def test_words_are_forgotten_when_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_CHARACTERS", 100)
    encoder = words_of(GPT2_PATTERN)
    for number in range(100):
        text = f"number {number} of a hundred"
        assert encoder.encode([text]) == [encode(TOKENIZERS[GPT2_PATTERN], text)]
        assert sum(map(len, encoder.known)) <= encoder.characters < 150


def test_a_mark_is_no_token_that_a_text_may_have() -> None:
    assert mark_of({5: "\u0120the", 6: "two words", 7: "<unk>", 8: "<|end|>"}, "<unk>") == (8, "<|end|>")
    assert mark_of({5: "\u0120the"}, None) is None


def test_words_that_begin_an_added_token_with_the_mark_behind_them_are_given_alone() -> None:
    tokenizer = cut_by(byte_level())
    tokenizer.add_tokens([AddedToken("a<|endoftext|>", normalized=False)])
    encoder = encoder_of(tokenizer)
    assert isinstance(encoder, BetweenMarks)
    assert encoder.words is not None
    assert encoder.words.mark == "<|endoftext|>"
    texts = ["a b", "b a", "a a<|endoftext|>a"]
    assert encoder.encode(texts) == [encode(tokenizer, text) for text in texts]


@pytest.mark.parametrize(
    ("normalizer", "pieces"),
    [
        (normalizers.Lowercase(), byte_level()),
        (None, split_by(r"\p{L}+|[^\p{L}]")),
        (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level()])),
        (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT2_PATTERN), "removed"), byte_level()])),
        (None, pre_tokenizers.Whitespace()),
    ],
)
def test_another_way_of_cutting_is_left_to_the_tokenizer(normalizer: Any, pieces: Any) -> None:
    tokenizer = cut_by(pieces)
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    assert word_pattern(json.loads(tokenizer.backend_tokenizer.to_str())) is None
    texts = ["It's  THE 12 x_1\n\nend"]
    assert encoder_of(tokenizer).encode(texts) == [encode(tokenizer, text) for text in texts]


def test_forms_of_unicode_leave_ascii_as_it_is() -> None:
    tokenizer = cut_by(byte_level())
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])
    assert word_pattern(json.loads(tokenizer.backend_tokenizer.to_str())) == GPT2_PATTERN
    texts = ["".join(map(chr, range(128))), "e\u0301 \ufb01", "fi e"]
    assert encoder_of(tokenizer).encode(texts) == [encode(tokenizer, text) for text in texts]
