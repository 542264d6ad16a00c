"""Many texts to token ids at once, over all cores, as the tokenizer would give them one by one.

An added token (`<|im_end|>`) ends whatever stands before it: the texts between two of them are tokenised on their own,
wherever they are. Turn marks and system prompts, which rows repeat, are therefore tokenised once. That holds for
tokenizers whose added tokens take no white space and whose other parts look at no position, which is read from the
tokenizer; another one is given whole texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.words import Words, cutting_of, flattened, mark_of

MOST_CHARACTERS = 1 << 23  # of remembered texts; then all are forgotten
PLACELESS_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace", "StripAccents"}
PLACELESS_PIECES = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}


class Encoder(Protocol):
    """Ids of texts that already hold their special tokens."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...


class WholeTexts:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_texts(self.tokenizer, texts, add_special_tokens=False)


class BetweenMarks:
    """Remembers the texts between added tokens. Not for two threads at once.

    `words` makes the tokens of those that it does not know yet, in place of the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Words | None = None) -> None:
        self.tokenizer = tokenizer
        self.added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        names = sorted(self.added, key=len, reverse=True)  # of two at one place the longest is meant
        self.marks = re.compile(f"({'|'.join(map(re.escape, names))})")
        self.known: dict[str, list[int]] = {}
        self.characters = 0
        self.words = words

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = [self.marks.split(text) for text in texts]  # every second one is an added token
        if self.characters > MOST_CHARACTERS:
            self.known.clear()
            self.characters = 0
        known = self.known
        fresh = list({piece: None for split in pieces for piece in split[::2] if piece not in known})
        self.characters += sum(map(len, fresh))
        ids = self.words.encode(fresh) if self.words else encode_texts(self.tokenizer, fresh, add_special_tokens=False)
        known.update(zip(fresh, ids, strict=True))
        return [self.joined(split) for split in pieces]

    def joined(self, pieces: list[str]) -> list[int]:
        ids = [*self.known[pieces[0]]]
        for mark, text in zip(pieces[1::2], pieces[2::2], strict=True):
            ids.append(self.added[mark])
            ids += self.known[text]
        return ids


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """The ids of each text as the tokenizer gives them one by one, over all cores where it is a Rust one."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]) for text in texts]
    rust = tokenizer.backend_tokenizer
    if rust.truncation is not None:
        rust.no_truncation()
    if rust.padding is not None:
        rust.no_padding()
    rust.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in rust.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    if not tokenizer.is_fast:
        return WholeTexts(tokenizer)
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if not is_placeless(tokenizer, parts):
        return WholeTexts(tokenizer)
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    cutting, mark = cutting_of(parts), mark_of(added, parts["model"].get("unk_token"))
    if cutting is None or mark is None:
        return BetweenMarks(tokenizer)
    return BetweenMarks(tokenizer, Words(cutting, mark, partial(encode_texts, tokenizer, add_special_tokens=False)))


def is_placeless(tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any]) -> bool:
    """Whether the ids of a text between two added tokens depend on that text alone. `parts` are those of tokenizer.json."""
    added = tokenizer.added_tokens_decoder.values()
    if tokenizer.split_special_tokens or not added:
        return False
    if any(not one.content or one.normalized or one.lstrip or one.rstrip or one.single_word for one in added):
        return False
    return (
        not parts["model"].get("dropout")
        and all(part["type"] in PLACELESS_NORMALIZERS for part in flattened(parts["normalizer"]))
        and all(
            part["type"] in PLACELESS_PIECES and not part.get("add_prefix_space")
            for part in flattened(parts["pre_tokenizer"])
        )
    )
