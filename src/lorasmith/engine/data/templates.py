"""Chat templates for base models that come without one. They use only text and the base's own end token."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lorasmith.errors import InvalidSpec, did_you_mean

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}"
        "{{ message['role'].capitalize() + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
}


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Give the tokenizer the named template, or keep its own. Raises `InvalidSpec` when it ends up with none."""
    if name is not None:
        if name not in TEMPLATES:
            raise InvalidSpec(
                f"no chat template {name!r}{did_you_mean(name, TEMPLATES)}", hint=f"templates: {', '.join(TEMPLATES)}"
            )
        tokenizer.chat_template = TEMPLATES[name]
    if tokenizer.chat_template is None:
        raise InvalidSpec(
            "this model has no chat template, and the data is conversations",
            hint=f"choose one, it is saved with the adapter: --template {' or --template '.join(TEMPLATES)}",
        )
    if tokenizer.eos_token_id is None:
        raise InvalidSpec("this tokenizer has no end-of-sequence token, so an answer could never stop")
