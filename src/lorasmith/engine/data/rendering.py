"""From an example to token ids and labels, by the template's own structure.

An assistant turn is found by rendering the conversation before it (with the generation prompt) and after it: what
the second has more is the answer and its stop token. The ids before an answer are therefore exactly those that a
server sends as the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.schemas.data import Example, Message


@dataclass(frozen=True)
class RenderedExample:
    """`ids` are the tokens; `trained[i]` says whether token i carries loss (is predicted from those before it)."""

    example_id: str
    row: int
    ids: list[int]
    trained: list[bool]

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained[1:])  # the first token has nothing before it


def render_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool) -> str:
    """The conversation as text; `prompt` ends it where the assistant's next turn begins."""
    rendered = tokenizer.apply_chat_template(
        [message.model_dump() for message in messages], tokenize=False, add_generation_prompt=prompt
    )
    assert isinstance(rendered, str)
    return rendered


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that already holds its special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """What a server feeds before the assistant's next turn."""
    return encode(tokenizer, render_text(tokenizer, messages, prompt=True))


def render_example(tokenizer: PreTrainedTokenizerBase, example: Example, stop_ids: set[int]) -> RenderedExample:
    """Ids and trained flags of one example. Raises `InvalidData` naming the row when the template cannot place it."""
    if example.messages is None:
        return render_completion(tokenizer, example)
    refuse_special_tokens(tokenizer, example)
    ids: list[int] = []
    trained: list[bool] = []
    done = ""
    for index, message in enumerate(example.messages):
        if message.role != "assistant":
            continue
        before = render_text(tokenizer, example.messages[:index], prompt=True)
        after = render_text(tokenizer, example.messages[: index + 1], prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise InvalidData(
                f"row {example.row}: the chat template renders turn {index + 1} differently once it is answered",
                hint="the template rewrites history; keep one answer per conversation, or choose --template",
            )
        context = encode(tokenizer, before[len(done) :])
        answer = encode(tokenizer, after[len(before) :])
        stop = next((position for position, token in enumerate(answer) if token in stop_ids), None)
        if stop is None:
            raise InvalidSpec(
                f"row {example.row}: the chat template ends an answer without a stop token, so the model would never stop",
                hint="choose a template whose answers end with the tokenizer's eos token: --template chatml",
            )
        ids += context + answer
        trained += [False] * len(context) + [position <= stop for position in range(len(answer))]
        done = after
    return RenderedExample(example.id, example.row, ids, trained)


def render_completion(tokenizer: PreTrainedTokenizerBase, example: Example) -> RenderedExample:
    """Plain text: each token trained, and the end token added unless it is there."""
    ids: list[int] = list(tokenizer(example.text or "")["input_ids"])
    if tokenizer.eos_token_id is None:
        raise InvalidSpec("this tokenizer has no end-of-sequence token, so a text could never stop")
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(int(tokenizer.eos_token_id))
    return RenderedExample(example.id, example.row, ids, [True] * len(ids))


def refuse_special_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """A special token inside a message would end or fake a turn."""
    for message in example.messages or []:
        for special in tokenizer.all_special_tokens:
            if special in message.content:
                raise InvalidData(
                    f"row {example.row}: the {message.role} message holds the special token {special!r}",
                    hint="remove it from the text; turns are marked by the template",
                )
