from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data.examples import render_part
from lorasmith.engine.data.rendering import RenderedExample, prompt_ids, render_example
from lorasmith.engine.data.templates import TEMPLATES, choose_template
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.data import Example
from tests.engine.chat_templates import conversation


def trained_text(tokenizer: PreTrainedTokenizerBase, row: RenderedExample) -> str:
    return str(tokenizer.decode([token for token, trains in zip(row.ids, row.trained, strict=True) if trains]))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]


def test_only_answers_and_their_stop_tokens_are_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    example = conversation(
        ("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2\n\n22")
    )
    row = render_example(tokenizer, example, stop_ids(tokenizer))
    assert trained_text(tokenizer, row) == "1<|im_end|>2\n\n22<|im_end|>"
    assert row.trained_tokens == sum(row.trained)


def test_the_ids_are_those_of_the_whole_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    example = conversation(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))
    row = render_example(tokenizer, example, stop_ids(tokenizer))
    turns = [message.model_dump() for message in example.messages or []]
    assert row.ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)


@pytest.mark.parametrize(
    "answer", ["plain", "\n\n  starts with white space", " one space", "ends with space \n", "é世界🙂"]
)
def test_the_prompt_is_what_a_server_sends(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    example = conversation(("user", "Say it."), ("assistant", answer))
    row = render_example(tokenizer, example, stop_ids(tokenizer))
    served = prompt_ids(tokenizer, example.prompt_messages())
    assert row.ids[: len(served)] == served
    assert not any(row.trained[: len(served)])
    assert trained_text(tokenizer, row) == f"{answer}<|im_end|>"


def test_a_completion_trains_every_token_and_gets_one_end(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example(id="0", group="0", row=1, text="def f():")
    row = render_example(tokenizer, example, stop_ids(tokenizer))
    assert tokenizer.decode(row.ids) == "def f():<|im_end|>"
    assert row.trained == [True] * len(row.ids)
    assert row.trained_tokens == len(row.ids) - 1  # nothing stands before the first token
    ended = Example(id="0", group="0", row=1, text="def f():<|im_end|>")
    assert render_example(tokenizer, ended, stop_ids(tokenizer)).ids == row.ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_base_without_a_template_gets_the_chosen_one(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    with pytest.raises(InvalidSpec, match="this model has no chat template") as raised:
        choose_template(bare, None)
    assert "--template chatml" in str(raised.value.hint)
    choose_template(bare, name)
    row = render_example(bare, conversation(("user", "a"), ("assistant", "b")), stop_ids(bare))
    assert trained_text(bare, row) == "b<|im_end|>"
    with pytest.raises(InvalidSpec, match="no chat template 'chatm'; did you mean 'chatml'"):
        choose_template(bare, "chatm")


def test_rows_over_the_limit_are_refused_with_the_ways_out(tokenizer: PreTrainedTokenizerBase) -> None:
    short, long = (
        conversation(("user", "a"), ("assistant", "b")),
        conversation(("user", "a"), ("assistant", "b " * 200)),
    )
    stops = stop_ids(tokenizer)
    with pytest.raises(InvalidSpec, match="1 of 2 rows are longer than 64 tokens; the longest, row 7, has ") as raised:
        render_part(tokenizer, [short, long], stops, max_tokens=64, too_long="error")
    assert "--set training.too_long=right, =left, =split or =drop" in str(raised.value.hint)
