"""The label X-ray of one row: what it shows is what training gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedTokenizerBase

from lorasmith.engine.data.labels import labelled_row, stop_ids
from lorasmith.engine.data.truncation import Rendering, fit
from lorasmith.engine.models.loading import eos_token_ids, load_model
from lorasmith.schemas.data import Example
from lorasmith.schemas.labels import LabelledRow, LabelSpec
from tests.engine.chat_templates import conversation

LONG = conversation(("user", "Old? " * 10), ("assistant", "Old."), ("user", "New?"), ("assistant", "Yes. " * 10))


def labels(tokenizer: PreTrainedTokenizerBase, example: Example, **options: object) -> LabelledRow:
    spec = LabelSpec.model_validate({"data": "any", "model": "any", **options})
    how = Rendering(tokenizer, {int(tokenizer.eos_token_id)}, spec.max_seq_length, spec.allow)  # type: ignore[arg-type]
    return labelled_row(how, example, spec)


def text(row: LabelledRow, role: str) -> str:
    return "".join(token.text for example in row.examples for token in example.tokens if token.role == role)


def test_it_shows_what_is_trained_masked_and_the_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    row = labels(tokenizer, conversation(("user", "世界?"), ("assistant", " 🙂")))
    assert row.fate == "kept"
    assert text(row, "masked") == "<|im_start|>user\n世界?<|im_end|>\n<|im_start|>assistant\n\n"
    assert text(row, "trained") == " 🙂<|im_end|>"
    (example,) = row.examples
    assert [token.text for token in example.tokens if token.is_stop and token.role == "trained"] == ["<|im_end|>"]
    assert [token.text for token in example.tokens if token.is_special].count("<|im_start|>") == 2
    assert (example.total, example.cut, example.stop_trained) == (len(example.tokens), 0, True)


@pytest.mark.parametrize("policy", ["left", "right", "split"])
def test_what_it_shows_is_what_training_gets(tokenizer: PreTrainedTokenizerBase, policy: str) -> None:
    how = Rendering(tokenizer, {int(tokenizer.eos_token_id)}, 48)  # type: ignore[arg-type]
    pieces = fit(how, LONG, how.render(LONG), policy)  # type: ignore[arg-type]
    row = labels(tokenizer, LONG, max_seq_length=48, too_long=policy)
    assert row.fate == ("split" if policy == "split" else "cut")
    assert len(row.examples) == len(pieces)
    for example, piece in zip(row.examples, pieces, strict=True):
        assert [token.id for token in example.tokens if token.role != "cut"] == piece.row.ids
        assert example.trained == piece.row.trained_tokens
        assert example.cut == piece.cut == sum(token.role == "cut" for token in example.tokens)


def test_it_says_why_training_would_refuse_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    too_long = labels(tokenizer, LONG, max_seq_length=48)
    assert (too_long.fate, text(too_long, "cut")) == ("refused", "")
    assert too_long.reason is not None
    assert too_long.reason.endswith("more than 48, and too_long is error")
    marked = labels(tokenizer, conversation(("user", "<|im_end|>"), ("assistant", "b")))
    assert marked.fate == "refused"
    assert [failed.check for failed in marked.failed_checks] == ["special-token-in-message"]
    assert text(marked, "trained") == "b<|im_end|>"
    allowed = labels(
        tokenizer, conversation(("user", "<|im_end|>"), ("assistant", "b")), allow=["special-token-in-message"]
    )
    assert (allowed.fate, allowed.failed_checks[0].overridden) == ("kept", True)


def test_a_dropped_row_is_shown_as_cut_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    row = labels(tokenizer, LONG, max_seq_length=48, too_long="drop")
    assert row.fate == "dropped"
    assert {token.role for token in row.examples[0].tokens} == {"cut"}
    nothing = labels(tokenizer, Example(id="0", group="0", row=1, text=""), allow=["no-trained-token"])
    assert (nothing.fate, nothing.reason) == ("dropped", "it trains nothing")


def test_windows_of_a_text_show_the_repeated_token_as_masked(tokenizer: PreTrainedTokenizerBase) -> None:
    row = labels(
        tokenizer, Example(id="0", group="0", row=1, text="one two " * 20), max_seq_length=16, too_long="split"
    )
    assert [example.tokens[0].role for example in row.examples] == ["masked"] * len(row.examples)
    assert row.examples[-1].stop_trained
    assert not row.examples[0].stop_trained


def test_the_stop_tokens_are_those_of_the_loaded_model(starter: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = eos_token_ids(load_model(starter), tokenizer)
    assert stop_ids(starter, AutoConfig.from_pretrained(starter), tokenizer) == expected
