"""A Hugging Face tokenizer in GGUF's terms. What llama.cpp would tokenise differently is refused, never guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.words import LLAMA3_PATTERN, QWEN2_PATTERN
from lorasmith.errors import InvalidModel

# (pattern, whether a whole word in the vocabulary skips its merges) -> tokenizer.ggml.pre
PRE_TOKENIZERS = {
    (LLAMA3_PATTERN, True): "llama-bpe",
    (LLAMA3_PATTERN, False): "smaug-bpe",
    (QWEN2_PATTERN, False): "qwen2",
    ("byte-level", False): "gpt-2",
    ("digits, byte-level", False): "smollm",
}
SPACE = "▁"
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


@dataclass(frozen=True)
class Vocabulary:
    """`tokenizer.ggml.*`: either byte-level BPE (`pre`, `merges`) or SentencePiece (`scores`, `add_space_prefix`)."""

    model: str
    tokens: list[str]
    types: list[TokenType]
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    pre: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_space_prefix: bool = False
    notes: tuple[str, ...] = ()


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The tokenizer's vocabulary with one token per embedding row; rows without a token become unused ones."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidModel("GGUF export needs a fast tokenizer (tokenizer.json), this one is written in Python")
    stored = json.loads(backend.to_str())
    model = stored["model"]
    if model["type"] != "BPE":
        raise refusal("model", f"of type {model['type']}", "BPE")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise refusal(field, repr(model[field]), "none")
    if tokenizer.eos_token_id is None:
        raise InvalidModel("this tokenizer has no end-of-sequence token, so a GGUF of it could never stop")
    tokens, types = tokens_by_id(stored, rows)
    add_bos, add_eos = added_around_text(tokenizer)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    shared: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "ids": special_ids(tokenizer, tokens, types, default_bos=not model.get("byte_fallback")),
        "add_bos": add_bos,
        "add_eos": add_eos,
        "chat_template": template_text(tokenizer),
    }
    if model.get("byte_fallback"):
        prefix = space_prefix(stored)
        return Vocabulary("llama", **shared, scores=scores(merges, tokens, types), add_space_prefix=prefix)
    notes = normalization_notes(stored["normalizer"])
    return Vocabulary("gpt2", **shared, pre=pre_tokenizer(stored), merges=merges, notes=notes)


def refusal(what: str, found: str, supported: str) -> InvalidModel:
    return InvalidModel(
        f"GGUF cannot carry this tokenizer: its {what} is {found}; supported: {supported}",
        hint="export a merged model instead",
    )


def tokens_by_id(stored: Mapping[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types of all `rows` tokens."""
    byte_fallback = bool(stored["model"].get("byte_fallback"))
    found: dict[int, tuple[str, TokenType]] = {}
    for text, id in stored["model"]["vocab"].items():
        is_byte = byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        found[id] = (text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in stored["added_tokens"]:
        for flag in ("lstrip", "rstrip", "single_word"):
            if added[flag]:
                raise refusal(f"token {added['content']!r}", f"marked {flag}", "tokens that match as they stand")
        found[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
        if byte_fallback and added["content"] == stored["model"].get("unk_token"):
            found[added["id"]] = (added["content"], TokenType.UNKNOWN)
    if max(found) >= rows:
        raise InvalidModel(f"the tokenizer has ids up to {max(found)}, the model has {rows} embedding rows")
    filled = [found.get(id, (f"[PAD{id}]", TokenType.UNUSED)) for id in range(rows)]
    return [text for text, _ in filled], [type for _, type in filled]


def pre_tokenizer(stored: Mapping[str, Any]) -> str:
    """`tokenizer.ggml.pre`, by the pattern that splits text into words."""
    pre = stored["pre_tokenizer"]
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            pattern = "byte-level"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            pattern = "digits, byte-level"
        case [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            pattern = regex
        case _:
            raise refusal("pre-tokenizer", json.dumps(pre), known_pre_tokenizers())
    key = (pattern, bool(stored["model"].get("ignore_merges")))
    if key not in PRE_TOKENIZERS:
        raise refusal("pre-tokenizer", f"{pattern} with ignore_merges {str(key[1]).lower()}", known_pre_tokenizers())
    return PRE_TOKENIZERS[key]


def known_pre_tokenizers() -> str:
    return "the ones of " + ", ".join(PRE_TOKENIZERS.values())


def normalization_notes(normalizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """llama.cpp does not normalise text for byte-level BPE; NFC, which leaves almost all text alone, is noted."""
    if normalizer is None:
        return ()
    if normalizer["type"] == "NFC":
        return ("the tokenizer brings text into Unicode form NFC; llama.cpp does not, so send it NFC text",)
    raise refusal("normalizer", normalizer["type"], "none, NFC")


def space_prefix(stored: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before each piece of text between special tokens."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer = stored["normalizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if stored["pre_tokenizer"] is None and steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
        return True
    if stored["pre_tokenizer"] is None and steps == [replace]:
        return False
    found = f"{json.dumps(normalizer)} with pre-tokenizer {json.dumps(stored['pre_tokenizer'])}"
    raise refusal("normalizer", found, "a leading ▁ and ▁ for each space, or the second alone")


def scores(merges: list[str], tokens: list[str], types: list[TokenType]) -> list[float]:
    """SentencePiece scores that lead to the same merges: minus the rank of the first merge that makes the token.

    llama.cpp joins any two neighbours whose join is a token, best score first. That equals merging by rank if
    the merges that make one token follow each other, and if no possible one is missing; otherwise `InvalidModel`.
    """
    rank: dict[str, int] = {}
    latest = ""
    pairs = {tuple(merge.split(" ", 1)) for merge in merges}
    for position, merge in enumerate(merges):
        made = merge.replace(" ", "", 1)
        if made != latest and made in rank:
            raise refusal("merge list", f"not sorted by token at {made!r}", "merges made from SentencePiece scores")
        rank.setdefault(made, position)
        latest = made
    normal = {token for token, type in zip(tokens, types, strict=True) if type == TokenType.NORMAL}
    for token in normal:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in normal and pair[1] in normal and pair not in pairs:
                raise refusal("merge list", f"without {' + '.join(pair)}", "merges made from SentencePiece scores")
    return [-float(rank[token]) if token in rank else 0.0 for token in tokens]


def added_around_text(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before and eos after a text, seen by doing it."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    for bos, eos in product((False, True), repeat=2):
        if full == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
            return bos, eos
    around = tokenizer.convert_ids_to_tokens(full)
    raise refusal("post-processor", f"adding tokens: {around}", "bos before a text, eos after it")


def special_ids(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], types: list[TokenType], *, default_bos: bool
) -> dict[str, int]:
    """bos, eos, eot, unk and pad ids, as far as they exist.

    A tokenizer without bos names its eos, as GPT-2 does: llama.cpp would take id 11 for a byte-level one.
    """
    bos = tokenizer.bos_token_id
    named = {
        "bos": tokenizer.eos_token_id if bos is None and default_bos else bos,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    ids = {name: int(id) for name, id in named.items() if id is not None}
    control = {token: id for id, token in enumerate(tokens) if types[id] == TokenType.CONTROL}
    end = next((text for text in TURN_ENDS if text in control), None)
    if end is not None:
        ids["eot"] = control[end]
    return ids


def template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several, the one named default."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
