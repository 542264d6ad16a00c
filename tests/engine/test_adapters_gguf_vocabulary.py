"""Tokenizers in GGUF: llama.cpp must split every text as the Hugging Face tokenizer does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorasmith.engine.adapters.gguf import add_vocabulary
from lorasmith.engine.adapters.gguf_vocabulary import Vocabulary, read_vocabulary
from lorasmith.engine.data.words import LLAMA3_PATTERN, QWEN2_PATTERN
from lorasmith.errors import InvalidModel
from tests.engine.adapter_cases import real_llama_cpp

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "the of and to in is you that it was for on are with as I'll don't WE'RE he's they've price orders shipped "
    "Größe naïve café straße Москва привет 你好 世界 こんにちは 안녕하세요 مرحبا שלום नमस्ते ไทย é ﬁ ½ ² Ⅷ ٣٤ "
    '123 4567 89012 3.14 1,000,000 x=1; foo_bar() == {"a": [1, 2]} </s> <div> http://a.b/c?d=e #hash @user $9.99 '
    "<tool> — … “quoted” ‘single’ 😀 👩‍👩‍👧 🇩🇪 ∑∫ → \u00a0 \u200b \u3000 \x01 \ufeff '' 's 'S 'll --- *** !!! ?!"
)
WORDS = TEXT.split(" ")
GAPS = [" ", " ", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "", "\u00a0", "        "]


def texts(count: int = 400) -> list[str]:
    """Varied strings, the same each time."""
    dice = random.Random(0)
    whitespace = [
        "",
        " ",
        "  ",
        "   x",
        "x   ",
        "\n",
        "\n\n\nx",
        " \n \n x",
        "\t\tx",
        "x \n",
        "a\u00a0b",
        "\u3000",
        "x\r\n\r\ny",
    ]
    drawn = [
        "".join(dice.choice(WORDS) + dice.choice(GAPS) for _ in range(dice.randint(1, 12))) for _ in range(count // 2)
    ]
    special = [
        "".join(dice.choice([*SPECIAL, *WORDS, *GAPS]) for _ in range(dice.randint(1, 12))) for _ in range(count // 2)
    ]
    return whitespace + drawn + special


def byte_level(pre: str) -> Tokenizer:
    """A byte-level BPE of 800 tokens with ChatML's special tokens, in the style of a known family."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with_pattern = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pattern = QWEN2_PATTERN if pre == "qwen2" else LLAMA3_PATTERN
    tokenizer.pre_tokenizer = {
        "gpt-2": with_pattern,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), with_pattern]),
    }.get(pre) or pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS * 3), "\n\n  the orders    are shipped\t1234567"], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])  # not special: matched all the same
    return tokenizer


def fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|im_end|>", **special})


def changed(tokenizer: Tokenizer, **fields: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer with other parts in its tokenizer.json; `model` is merged into what is there."""
    stored = json.loads(tokenizer.to_str())
    stored["model"] |= fields.pop("model", {})
    return fast(Tokenizer.from_str(json.dumps(stored | fields)))


def sentencepiece() -> Tokenizer:
    """What transformers makes of a SentencePiece model: every way to make a piece is a merge, best pieces first."""
    learner = Tokenizer(models.BPE())
    words = [f"▁{word}" for word in WORDS]
    learner.train_from_iterator(words * 2, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["".join(merge) for merge in learned["merges"]]
    characters = sorted({character for piece in [*words, *pieces] for character in piece})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(pieces), *characters]
    vocabulary = {name: id for id, name in enumerate(dict.fromkeys(names))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in dict.fromkeys(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.fixture(scope="module")
def llama_cpp() -> ModuleType:
    return real_llama_cpp()


def load_vocabulary(llama_cpp: ModuleType, vocabulary: Vocabulary, path: Path) -> Any:
    """A GGUF of a vocabulary alone, opened by llama.cpp."""
    writer = GGUFWriter(path, "llama")
    add_vocabulary(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "smaug-bpe", "smollm"])
def test_llama_cpp_splits_byte_level_text_as_the_tokenizer_does(
    pre: str, llama_cpp: ModuleType, tmp_path: Path
) -> None:
    tokenizer = fast(byte_level(pre))
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert vocabulary.pre == pre
    model = load_vocabulary(llama_cpp, vocabulary, tmp_path / "vocabulary.gguf")
    for text in texts():
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == expected, repr(text)


def test_llama_cpp_splits_sentencepiece_text_as_the_tokenizer_does(llama_cpp: ModuleType, tmp_path: Path) -> None:
    tokenizer = fast(sentencepiece(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert (vocabulary.model, vocabulary.add_bos, vocabulary.add_space_prefix) == ("llama", True, True)
    model = load_vocabulary(llama_cpp, vocabulary, tmp_path / "vocabulary.gguf")
    for text in [*texts(), "<s>a</s> b", "a <s> b"]:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == expected, repr(text)
    assert model.tokenize(b"the", add_bos=True)[0] == tokenizer.bos_token_id


def test_special_tokens_are_control_tokens_and_missing_rows_unused() -> None:
    tokenizer = fast(byte_level("gpt-2"), pad_token="<|endoftext|>")
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 2)
    assert vocabulary.tokens[:3] == SPECIAL
    assert vocabulary.types[:3] == [TokenType.CONTROL] * 3
    assert vocabulary.types[len(tokenizer) - 1] == TokenType.USER_DEFINED
    assert vocabulary.tokens[-1] == f"[PAD{len(tokenizer) + 1}]"
    assert vocabulary.types[-2:] == [TokenType.UNUSED] * 2
    assert vocabulary.ids == {"bos": 2, "eos": 2, "eot": 2, "pad": 0}
    assert (vocabulary.add_bos, vocabulary.add_eos) == (False, False)


def test_text_normalisation_that_llama_cpp_lacks_is_noted() -> None:
    tokenizer = byte_level("qwen2")
    tokenizer.normalizer = normalizers.NFC()
    assert "so send it NFC text" in read_vocabulary(fast(tokenizer), 900).notes[0]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
OTHER_PATTERN = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"add_prefix_space": False, "use_regex": False},
    ],
}
STRIPPED = [{"id": 0, "content": "<|endoftext|>", "special": True} | dict.fromkeys(("single_word", "lstrip"), False)]
STRIPPED[0] |= {"rstrip": True, "normalized": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre_tokenizer": BYTE_LEVEL}, r"its pre-tokenizer is .*\"add_prefix_space\": true.*; supported: the ones of"),
        ({"pre_tokenizer": OTHER_PATTERN}, r"its pre-tokenizer is \[a-z\]\+ with ignore_merges false; supported"),
        ({"pre_tokenizer": None}, "its pre-tokenizer is null; supported: the ones of llama-bpe, smaug-bpe, qwen2"),
        ({"model": {"ignore_merges": True}}, "its pre-tokenizer is byte-level with ignore_merges true"),
        ({"model": {"dropout": 0.1}}, r"its dropout is 0.1\d*; supported: none"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is Lowercase; supported: none, NFC"),
        ({"added_tokens": STRIPPED}, r"its token '<\|endoftext\|>' is marked rstrip; supported: tokens that match"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_split_otherwise_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        read_vocabulary(changed(byte_level("gpt-2"), **fields), 900)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<|im_end|>": 1}, unk_token="a"))
    with pytest.raises(InvalidModel, match="its model is of type WordLevel; supported: BPE"):
        read_vocabulary(fast(tokenizer), 2)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level("gpt-2"))
    with pytest.raises(InvalidModel, match="no end-of-sequence token, so a GGUF of it could never stop"):
        read_vocabulary(tokenizer, 900)


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    tokenizer = fast(byte_level("gpt-2"))
    last = len(tokenizer) - 1
    with pytest.raises(InvalidModel, match=f"has ids up to {last}, the model has {last} embedding rows"):
        read_vocabulary(tokenizer, last)


def test_a_tokenizer_that_adds_other_tokens_is_refused() -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(InvalidModel, match=r"its post-processor is adding tokens: \['a', '<\|endoftext\|>'\]"):
        read_vocabulary(fast(tokenizer), 900)


def test_a_tokenizer_without_a_fast_version_is_refused() -> None:
    class Slow:
        eos_token_id = 0

    with pytest.raises(InvalidModel, match=r"needs a fast tokenizer \(tokenizer.json\)"):
        read_vocabulary(Slow(), 10)  # type: ignore[arg-type]


def test_sentencepiece_text_with_another_space_rule_is_refused() -> None:
    tokenizer = sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    with pytest.raises(
        InvalidModel, match="its normalizer is null with pre-tokenizer .*Metaspace.*; supported: a leading ▁"
    ):
        read_vocabulary(fast(tokenizer, bos_token="<s>", eos_token="</s>"), 2000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda merges: merges[1:], r"its merge list is without .* \+ .*; supported: merges made from"),
        (lambda merges: [*merges, merges[0]], "its merge list is not sorted by token at"),
    ],
)
def test_byte_fallback_merges_that_scores_cannot_express_are_refused(damage: Any, message: str) -> None:
    tokenizer = sentencepiece()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    with pytest.raises(InvalidModel, match=message):
        read_vocabulary(fast_from(tokenizer, damage(merges)), 2000)


def fast_from(tokenizer: Tokenizer, merges: list[list[str]]) -> Any:
    """A tokenizer whose tokenizer.json holds these merges, which the library itself may not load."""

    class Stored:
        def to_str(self) -> str:
            stored = json.loads(tokenizer.to_str())
            stored["model"]["merges"] = merges
            return json.dumps(stored)

    class Wrapped(PreTrainedTokenizerFast):
        backend_tokenizer = Stored()

    return Wrapped(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
