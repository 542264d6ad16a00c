from __future__ import annotations

import pytest

from lorasmith.engine.data.template_flow import Flow, content_flow
from lorasmith.engine.data.templates import TEMPLATES
from tests.engine.chat_templates import SHAPES


def over_messages(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        *TEMPLATES.values(),
        SHAPES["chatml"].template,
        over_messages("{{ m.content }}"),
        over_messages("{{ m['role'].upper() ~ m.get('content') }}"),
        over_messages("{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}"),
        over_messages("{{ m.content if m.content is string else '' }}"),
        over_messages("{{ m.content or '-' }}{% if loop.index0 % 2 == 0 or not loop.last %};{% endif %}"),
        over_messages("{% if 'content' in m and m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}"),
        over_messages("{% generation %}{{ m.content }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}"),
        "{% set ns = namespace(first='') %}"
        + over_messages("{% if m.role == 'system' %}{% set ns.first = m.content %}{% else %}{{ ns.first }}{% endif %}"),
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set said = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set said = false %}{% endif %}"
        "{% for m in rest %}{{ said if loop.first and said != false else '' }}{{ m['content'] }}{% endfor %}",
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages | length }}{{ (messages | last).content }}",
    ],
)
def test_contents_that_are_only_written_flow_into_the_text(template: str) -> None:
    assert content_flow(template) == Flow(trims=False)


@pytest.mark.parametrize(
    "template",
    [
        *(SHAPES[name].template for name in ("llama-3", "gemma", "mistral")),
        over_messages("{{ m.content.strip() }}"),
        over_messages("{% set said = m.content %}{{ ('> ' + said) | trim }}"),
    ],
)
def test_it_is_known_where_white_space_may_be_taken_away(template: str) -> None:
    assert content_flow(template) == Flow(trims=True)


@pytest.mark.parametrize(
    "body",
    [
        "{% if m.content == 'x' %}a{% endif %}",
        "{% if 'x' in m.content %}a{% endif %}",
        "{% if m.content in ['x'] %}a{% endif %}",
        "{% if m.content in 'xyz' %}a{% endif %}",
        "{% if m.content | length > 3 %}a{% endif %}",
        "{% if m.content.startswith('x') %}a{% endif %}",
        "{% if 'x'.startswith(m.content) %}a{% endif %}",
        "{{ m.content.split('</think>')[-1] }}",
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ m.content | trim('x') }}",
        "{{ m.content[:3] }}",
        "{{ m.content * 2 }}",
        "{{ '%9s' % m.content }}",
        "{{ '%9s' % (m.content,) }}",
        "{{ '{:>9}'.format(m.content) }}",
        "{{ [m.content] | join }}",
        "{{ {'x': m.content} | tojson }}",
        "{{ m }}",
        "{{ m | tojson }}",
        "{{ m.values() | list }}",
        "{{ messages }}",
        "{{ m[name] }}",
        "{{ m | attr('content') | length }}",
        "{% for letter in m.content %}{{ letter }}{% endfor %}",
        "{% for part in [m.content] %}{{ part | upper }}{% endfor %}",
        "{% set said = m.content %}{% if said == 'x' %}a{% endif %}",
        "{% set said = said ~ m.content %}{% if said == 'x' %}a{% endif %}",
        "{% set said = (m.content if loop.first else '') %}{{ said | upper }}",
        "{% if loop.previtem and loop.previtem.content == 'x' %}a{% endif %}",
        "{% if (loop | attr('previtem')).content == 'x' %}a{% endif %}",
        "{% set l = loop %}{{ l.previtem.content | upper }}",
        "{% if loop.changed(m.content) %}a{% endif %}",
        "{% set ns = namespace(said='') %}{% set ns.said = m.content %}{% if ns.said == 'x' %}a{% endif %}",
        "{% set ns = namespace(said='') %}{% set ns.said = m.content %}{% set other = ns %}{{ other.said | upper }}",
        "{% set ns = namespace(said=m.content) %}{{ ns.said | upper }}",
        "{% set said %}{{ m.content }}{% endset %}{{ said | upper }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% macro say(what) %}{{ what | upper }}{% endmacro %}{{ say(m.content) }}",
        "{{ ['a', 'b'] | random }}{{ m.content }}",
        "{{ lipsum() }}{{ m.content }}",
        "{{ strftime_now('%d') }}{{ m.content }}",
        "{{ dict(x=m.content).x | upper }}",
    ],
)
def test_a_template_that_may_look_into_a_content_is_recognised(body: str) -> None:
    assert content_flow(over_messages(body)) is None


def test_a_name_that_is_read_above_its_assignment_is_followed() -> None:
    template = "{% set said = '' %}" + over_messages("{% if said == 'x' %}a{% endif %}{% set said = m.content %}")
    assert content_flow(template) is None


def test_a_template_that_would_take_long_to_follow_is_left_alone() -> None:
    chain = "".join(f"{{% set a{number} = a{number + 1} %}}" for number in range(20))
    assert content_flow(over_messages(chain + "{% set a20 = m.content %}{{ a0 }}")) is None
    assert content_flow(over_messages("{{ m.content }}{{ " + " + ".join(["'a'"] * 5000) + " }}")) is None
