"""Templates of the shapes that real models have, each on the starter's tokenizer with the special tokens it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.schemas.data import Example, Message

# Llama 3's: a run of new lines is one piece whatever follows, so its header before an answer has the same tokens as
# one inside a conversation. With GPT-2's pattern, the starter's, it has not.
LLAMA_3_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Shape:
    """`stop` ends an answer; `system` says whether the template takes a system turn."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    stop: str
    system: bool = True
    pieces: str | None = None


SHAPES = {
    "chatml": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        special=("<|im_start|>", "<|im_end|>"),
        bos=None,
        stop="<|im_end|>",
    ),
    "llama-3": Shape(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        stop="<|eot_id|>",
        pieces=LLAMA_3_PIECES,
    ),
    "gemma": Shape(  # the system turn becomes the beginning of the first user turn
        "{{ bos_token }}"
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] | trim + '\\n\\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        stop="<end_of_turn>",
    ),
    "mistral": Shape(  # turn marks are plain text; only the end of an answer is special
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
        special=("<s>", "</s>"),
        bos="<s>",
        stop="</s>",
        system=False,
    ),
}


def shaped_tokenizer(starter: Path, shape: Shape) -> tuple[PreTrainedTokenizerBase, set[int]]:
    """The tokenizer with that template, and its stop ids."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(starter)
    tokenizer.add_special_tokens({"additional_special_tokens": list(shape.special)})
    tokenizer.chat_template = shape.template
    if shape.bos:
        tokenizer.bos_token = shape.bos
    tokenizer.eos_token = shape.stop
    if shape.pieces:
        split = pre_tokenizers.Split(Regex(shape.pieces), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return tokenizer, {int(tokenizer.convert_tokens_to_ids(shape.stop))}  # type: ignore[arg-type]


def conversation(*turns: tuple[str, str], row: int = 7) -> Example:
    messages = [Message.model_validate({"role": role, "content": content}) for role, content in turns]
    return Example(id="0", group="0", row=row, messages=messages)
