"""Chat templates that would hang or fill a machine, rendered as training, chat and previews render them."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data import template_limits
from lorasmith.engine.data.rendering import render_example, render_text
from lorasmith.engine.data.template_limits import check_template
from lorasmith.errors import InvalidModel
from lorasmith.schemas.data import Example, Message

TURNS = [Message(role="user", content="Hello"), Message(role="assistant", content="Hi")]
EXAMPLE = Example(id="a", row=1, group="a", messages=TURNS)
SECONDS = "more than 1 s for 1 conversations"
MEMORY = "more than 2 GiB of memory"
HOSTILE = {
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", SECONDS),
    "loop in a macro": (
        "{% macro m() %}{% for a in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
        "{% call m() %}{% call m() %}{% endcall %}{% endcall %}",
        SECONDS,
    ),
    "large range": ("{% for i in range(1000000000) %}{% endfor %}", "does not take a conversation: Range too big"),
    "repetition": ("{{ 'a' * 10000000000 }}", MEMORY),
    "repeated list": ("{{ ([0] * 10000000000) | length }}", MEMORY),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
        f"{SECONDS}|{MEMORY}",
    ),
    "replacing": (
        "{% set n = namespace(x='aa') %}{% for i in range(9) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        MEMORY,
    ),
    "center": ("{{ 'a' | center(10000000000) }}", MEMORY),
    "ljust": ("{{ 'a'.ljust(10000000000) }}", MEMORY),
    "format": ("{{ '{:>10000000000}'.format('a') }}", MEMORY),
    "percent": ("{{ '%10000000000s' % 'a' }}", MEMORY),
    "indent": ("{{ 'a\\nb' | indent(10000000000) }}", MEMORY),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "more calls within calls"),
    "power": ("{{ 10 ** 1000000000 }}", "computes powers, in line 1"),
    "rounding": ("{{ 1.5 | round(1000000000, 'ceil') }}", "computes powers, in line 1"),
    "mapped rounding": ("{{ [1.5] | map('round', 1000000000, 'ceil') | list }}", "computes powers, in line 1"),
    "mapped variable": ("{{ [1.5] | map(messages[0].content, 1000000000) | list }}", "computes powers, in line 1"),
    "long text": ("{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}", "makes 9,999,900 characters of one"),
    "own error": (
        "{{ raise_exception('Roles must alternate') }}",
        "does not take a conversation: Roles must alternate",
    ),
    "no template": ("{% for %}", "is not one of jinja2"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is not one of jinja2"),
}


@pytest.fixture
def tokenizer(starter: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    """Of its own, with a second instead of ten."""
    monkeypatch.setattr(template_limits, "SECONDS", 0.6)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(starter)
    return loaded


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_does_not_end_is_stopped(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template, message = HOSTILE[name]
    before = resource.getrlimit(resource.RLIMIT_AS)
    began = time.thread_time()
    with pytest.raises(InvalidModel, match=message):
        render_text(tokenizer, TURNS, prompt=True)
    assert time.thread_time() - began < 5
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_the_limit_holds_in_another_thread_and_that_thread_goes_on(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = HOSTILE["nested loops"][0]
    said: list[str] = []

    def render() -> None:
        with pytest.raises(InvalidModel) as raised:
            render_text(tokenizer, TURNS, prompt=True)
        said.append(raised.value.message)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert said == ["the chat template takes more than 1 s for 1 conversations"]


def test_waiting_for_the_machine_is_not_the_templates_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.1)
    with template_limits.limits(1):
        time.sleep(0.6)


def test_a_hostile_template_stops_a_row_too_and_the_next_template_is_rendered(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    own = tokenizer.chat_template
    tokenizer.chat_template = HOSTILE["repetition"][0]
    with pytest.raises(InvalidModel, match="GiB of memory") as raised:
        render_example(tokenizer, EXAMPLE, {2})
    assert raised.value.hint is not None
    assert "--template chatml" in raised.value.hint
    tokenizer.chat_template = own
    assert render_example(tokenizer, EXAMPLE, {2}).trained_tokens


def test_several_templates_are_all_looked_at(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 2 ** 9 }}"}
    with pytest.raises(InvalidModel, match="computes powers"):
        render_text(tokenizer, TURNS, prompt=True)


def test_the_tag_of_transformers_is_known() -> None:
    check_template("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    with pytest.raises(InvalidModel, match="computes powers, in line 2"):
        check_template("{% generation %}\n{{ 2 ** 9 }}{% endgeneration %}")
