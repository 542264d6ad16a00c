from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data.parts import render_part
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


# The tool parts of Qwen2.5's template.
TOOL_TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tool_example() -> Example:
    call = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "Sunny."},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    return Example.model_validate({"id": "0", "group": "0", "row": 1, "messages": messages, "tools": tools})


def test_calls_of_tools_are_rendered_by_the_template_and_trained(starter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(starter)
    tokenizer.chat_template = TOOL_TEMPLATE
    example = tool_example()
    row = render_example(tokenizer, example, stop_ids(tokenizer))
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'
    assert trained_text(tokenizer, row) == f"{call}<|im_end|>Sunny.<|im_end|>"
    turns = [message.for_template() for message in example.messages or []]
    assert row.ids == tokenizer.apply_chat_template(turns, tools=example.tools, tokenize=True, return_dict=False)


def test_a_template_that_leaves_calls_out_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidSpec, match="row 1: the chat template does not render the call of 'weather'"):
        render_example(tokenizer, tool_example(), stop_ids(tokenizer))


def test_an_answer_of_weight_zero_is_read_and_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    example = conversation(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))
    whole = render_example(tokenizer, example, stop_ids(tokenizer))
    assert example.messages is not None
    example.messages[1].weight = 0
    row = render_example(tokenizer, example, stop_ids(tokenizer))
    assert row.ids == whole.ids
    assert trained_text(tokenizer, row) == "2<|im_end|>"
