"""Texts that are cut into words have the ids that the tokenizer gives them whole."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from functools import cache
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
    UNLISTED,
    Words,
    cutting_of,
    for_python,
    mark_of,
)
from lorasmith.errors import InvalidModel
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


@cache
def listed() -> list[str]:
    """Every character with which a text is cut."""
    return [one for one in map(chr, range(0x110000)) if not UNLISTED.match(one)]


def words_of(pattern: str) -> Words:
    encoder = encoder_of(TOKENIZERS[pattern])
    assert isinstance(encoder, BetweenMarks)
    assert encoder.words is not None
    return encoder.words


@pytest.mark.parametrize("pattern", CUTTING, ids=["gpt-2", "smollm", "llama-3", "qwen-2"])
def test_python_cuts_where_the_tokenizer_does(pattern: str) -> None:
    ascii = [chr(code) for code in range(128)]
    texts = ["".join(some) for length in (1, 2, 3, 4) for some in product(KINDS, repeat=length)]
    texts += ["".join(pair) for pair in product(ascii, ascii)]
    texts += [f"a{one}a {one}1{one} {one}'s{one}\n{one} \n {one}{one}  {one}\n" for one in listed()]
    cut = re.compile(for_python(pattern), re.ASCII)
    for text in texts:
        pieces = [text[start:end] for _, (start, end) in CUTTING[pattern].pre_tokenize_str(text)]
        assert cut.findall(text) == pieces, repr(text)


@pytest.mark.parametrize("pattern", CUTTING, ids=["gpt-2", "smollm", "llama-3", "qwen-2"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_texts_have_the_same_ids_whole_and_in_words(pattern: str, data: st.DataObject) -> None:
    some = st.text(st.sampled_from(listed()), max_size=4) | st.sampled_from(
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
    assert mark_of({5: "<<", 6: "abcab", 7: "--"}, None) is None  # `<` before `<<` would be found one place too early


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
    assert cutting_of(json.loads(tokenizer.backend_tokenizer.to_str())) is None
    texts = ["It's  THE 12 x_1\n\nend"]
    assert encoder_of(tokenizer).encode(texts) == [encode(tokenizer, text) for text in texts]


def test_listed_characters_have_no_other_form_nor_one_together() -> None:
    rng = random.Random(0)
    text = "".join(rng.choices(listed(), k=100_000)) + "".join(listed())
    assert normalizers.NFC().normalize_str(text) == text
    assert not any(unicodedata.category(one) == "Cn" or unicodedata.combining(one) for one in listed())


@pytest.mark.parametrize("forms", [[normalizers.NFC()], [normalizers.NFC(), normalizers.NFKC()], [normalizers.NFD()]])
def test_texts_are_cut_that_the_forms_of_unicode_leave_as_they_are(forms: list[Any]) -> None:
    tokenizer = cut_by(byte_level())
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(forms)
    cutting = cutting_of(json.loads(tokenizer.backend_tokenizer.to_str()))
    assert cutting is not None
    assert cutting.words("a b") == ["a", " b"]
    assert cutting.words("\ufb01") is None
    assert cutting.words("\u00e9") == (["\u00e9"] if len(forms) == 1 and "NFC" in str(forms) else None)
    texts = ["".join(map(chr, range(128))), "e\u0301 \ufb01 \u00e9 ", "fi \u00e9"]
    assert encoder_of(tokenizer).encode(texts) == [encode(tokenizer, text) for text in texts]


def test_where_many_words_are_new_only_those_that_repeat_are_remembered() -> None:
    rng = random.Random(0)
    texts = [" ".join(str(rng.randrange(10**9)) for _ in range(10)) for _ in range(20)]
    texts += ["a b a b a b"]
    encoder = words_of(GPT2_PATTERN)
    assert encoder.encode(texts) == [encode(TOKENIZERS[GPT2_PATTERN], text) for text in texts]
    assert set(encoder.known) == {" a", " b"}
    assert encoder.encode(texts[-1:] * 5) == [encode(TOKENIZERS[GPT2_PATTERN], texts[-1])] * 5


def test_a_text_that_comes_out_otherwise_than_its_words_stops_it() -> None:
    tokenizer = TOKENIZERS[GPT2_PATTERN]
    found = encoder_of(tokenizer)
    assert isinstance(found, BetweenMarks)
    assert found.words
    found.words.encode(["one two", "one two"])
    found.words.known[" two"] = (1, 2, 3)
    with pytest.raises(InvalidModel, match=r"'one two' is \[.*\] instead of \[.*1, 2, 3\]"):
        found.words.encode(["one two"])
