from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data import template_forms
from lorasmith.engine.data.rendering import render_all
from lorasmith.engine.data.template_forms import Conversation, Forms, forms_of
from lorasmith.errors import InvalidModel
from lorasmith.schemas.data import Message, ToolCall, ToolFunction
from lorasmith.starter.location import starter_model
from tests.engine.chat_templates import SHAPES, shaped_tokenizer

CONTENTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["", " ", "\n", " a ", "a\n", "{{ x }}", "<b>&\"'", "\\1", "İ", "\u2028"])
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    exchanges = draw(st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
    said = [("system", draw(CONTENTS))] if draw(st.booleans()) else []
    for question, answer in exchanges:
        said += [("user", question), ("assistant", answer)]
    return [Message.model_validate({"role": role, "content": content}) for role, content in said]


def rendered_one_by_one(tokenizer: PreTrainedTokenizerBase, given: Sequence[Conversation], prompt: bool) -> list[str]:
    return [
        str(
            tokenizer.apply_chat_template(
                [message.for_template() for message in messages], tokenize=False, add_generation_prompt=prompt
            )
        )
        for messages in given
    ]


@pytest.mark.parametrize("name", SHAPES)
@settings(deadline=None, max_examples=60)
@given(st.lists(conversations(), min_size=1, max_size=6), st.booleans())
def test_a_conversation_has_the_text_that_its_template_renders(
    name: str, given: list[list[Message]], prompt: bool
) -> None:
    tokenizer, _ = shaped_tokenizer(starter_model(), SHAPES[name])
    if not SHAPES[name].system:
        given = [[message for message in messages if message.role != "system"] for messages in given]
    assert render_all(tokenizer, given, prompt, None) == rendered_one_by_one(tokenizer, given, prompt)


def counted(forms: Forms, given: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many conversations the template itself renders for them; the texts are compared."""
    count = 0

    def render(conversations: Sequence[Conversation]) -> list[str]:
        nonlocal count
        count += len(conversations)
        return rendered_one_by_one(tokenizer, conversations, False)

    assert forms.render(given, render) == rendered_one_by_one(tokenizer, given, False)
    return count


def exchange(question: str, answer: str) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def test_each_form_is_rendered_once_and_one_conversation_of_a_call_for_comparison(starter: Path) -> None:
    tokenizer, _ = shaped_tokenizer(starter, SHAPES["chatml"])
    forms = forms_of(SHAPES["chatml"].template, (), False)
    assert forms is not None
    forms.known.clear()
    assert counted(forms, [exchange(str(number), " x\n") for number in range(50)], tokenizer) == 2
    assert counted(forms, [exchange("other", "words"), exchange("no answer", "")], tokenizer) == 2


def test_what_has_no_form_is_rendered(starter: Path) -> None:
    tokenizer, _ = shaped_tokenizer(starter, SHAPES["llama-3"])
    forms = forms_of(SHAPES["llama-3"].template, (), False)
    assert forms is not None
    call = ToolCall(function=ToolFunction(name="f", arguments={}))
    rest = [
        exchange("a", "trimmed here\n"),
        exchange("a", "b") * 10,
        [*exchange("a", "b"), Message(role="assistant", content="c", tool_calls=[call])],
    ]
    assert counted(forms, rest, tokenizer) == len(rest)


def test_contents_that_are_written_many_times_are_left_to_the_template_and_its_limits(starter: Path) -> None:
    template = "{% for m in messages %}{% for i in range(9) %}{{ m.content }}{% endfor %}{% endfor %}"
    tokenizer, _ = shaped_tokenizer(starter, SHAPES["chatml"])
    tokenizer.chat_template = template
    forms = forms_of(template, (), False)
    assert forms is not None
    assert counted(forms, [exchange("a", "b"), exchange("c", "d")], tokenizer) == 2 + 1  # and the form itself


def test_forms_that_are_too_many_are_forgotten(starter: Path) -> None:
    tokenizer, _ = shaped_tokenizer(starter, SHAPES["chatml"])
    forms = forms_of(SHAPES["chatml"].template, (), False)
    assert forms is not None
    with patch.object(template_forms, "MOST_FORMS", 2):
        for length in range(1, 8):
            counted(forms, [exchange("a", "b") * length], tokenizer)
            assert len(forms.known) <= 3


def test_a_text_that_is_another_one_each_time_stops_the_run(starter: Path) -> None:
    tokenizer, _ = shaped_tokenizer(starter, SHAPES["chatml"])
    forms = forms_of(SHAPES["chatml"].template, (), True)
    assert forms is not None
    count = 0

    def render(conversations: Sequence[Conversation]) -> list[str]:
        nonlocal count
        count += 1
        return [f"{count} {text}" for text in rendered_one_by_one(tokenizer, conversations, False)]

    with pytest.raises(InvalidModel, match="another text of a conversation each time it is rendered"):
        forms.render([exchange("a", "b")], render)
