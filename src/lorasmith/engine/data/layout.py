"""Which token comes from which message, and which from the template: what may be cut, and what a row shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.checks import ALL_CHECKS, RowChecks
from lorasmith.engine.data.rendering import Tools, answered_turns, doubled_beginnings, render_text
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.data import Example, Message

Span = tuple[int, int]
MARK = "\ue000{}\ue001"  # private-use characters: no template trims them, no text has them between its messages
MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Layout:
    """Per token: the text it stands for, the message it belongs to (None: the template's), and whether it begins
    inside a character of the token before it. Joined, the texts are the row. `found` is false where the template
    changes what messages say, so that no token can be told from its own."""

    texts: list[str]
    message: list[int | None]
    inside_character: list[bool]
    found: bool = True

    def contents(self) -> dict[int, list[int]]:
        """Message index → positions of its tokens, in order."""
        found: dict[int, list[int]] = {}
        for position, index in enumerate(self.message):
            if index is not None:
                found.setdefault(index, []).append(position)
        return found


def token_layout(tokenizer: PreTrainedTokenizerBase, example: Example) -> Layout:
    """The layout of `render_example(tokenizer, example, …)`, token by token."""
    if not tokenizer.is_fast:
        raise InvalidSpec(
            f"{type(tokenizer).__name__} does not say where in the text its tokens lie, so rows cannot be cut or shown",
            hint="--set training.too_long=drop, or a model folder with tokenizer.json",
        )
    if example.messages is None:
        return completion_layout(tokenizer, example.text or "")
    turns = answered_turns(tokenizer, example, RowChecks(example.row, ALL_CHECKS))
    pieces = [piece for turn in turns for piece in (turn.context, turn.answer)]
    spans = content_spans(tokenizer, answered(example.messages), "".join(pieces), example.tools)
    tokens: list[Span] = []
    begin = 0
    for piece in pieces:
        encoding = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        tokens += [(begin + start, begin + end) for start, end in encoding["offset_mapping"]]
        begin += len(piece)
    layout = placed(tokens, spans or [], "".join(pieces))
    return replace(layout, found=spans is not None)


def completion_layout(tokenizer: PreTrainedTokenizerBase, text: str) -> Layout:
    """All but the tokenizer's own first and last tokens belong to message 0."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids: list[int] = list(encoding["input_ids"])
    doubled = doubled_beginnings(tokenizer, ids)
    ids = ids[doubled:]
    tokens: list[Span] = [(start, end) for start, end in encoding["offset_mapping"]][doubled:]
    end_text = str(tokenizer.eos_token)
    ends = bool(ids) and ids[-1] == tokenizer.eos_token_id
    content_end = len(text) - len(end_text) if ends and text.endswith(end_text) else len(text)
    layout = placed(tokens, [(tokens[0][1] if doubled else 0, content_end)], text)
    for position, (start, end) in enumerate(tokens):
        if start == end and not layout.texts[position]:  # added by the tokenizer
            layout.texts[position] = str(tokenizer.convert_ids_to_tokens(ids[position]))
    if not ends:
        layout.texts.append(end_text)
        layout.message.append(None)
        layout.inside_character.append(False)
    return layout


def placed(tokens: Sequence[Span], spans: Sequence[Span], text: str) -> Layout:
    """A token belongs to a message when it lies wholly inside its content; one across a border is the template's."""
    layout = Layout([], [], [])
    seen = index = 0
    for start, end in tokens:
        begin = min(start, seen)  # some tokenizers leave the space before a word out of its token
        while index < len(spans) and spans[index][1] <= begin:
            index += 1
        inside = index < len(spans) and spans[index][0] <= begin < end <= spans[index][1]
        layout.message.append(index if inside else None)
        layout.inside_character.append(start < seen and start < end)
        layout.texts.append(text[seen:end])
        seen = max(seen, end)
    return layout


def answered(messages: Sequence[Message]) -> list[Message]:
    """The conversation up to its last answer; nothing after it is trained."""
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    return list(messages[: last + 1])


def content_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, tools: Tools | None = None
) -> list[Span] | None:
    """Where each message's content stands in the rendered text; None when the template changes contents.

    The conversation is rendered with marks in place of contents; what stands between the marks is the template.
    """
    marked = [message.model_copy(update={"content": MARK.format(index)}) for index, message in enumerate(messages)]
    pieces = MARKS.split(render_text(tokenizer, marked, prompt=False, tools=tools))
    if [int(piece) for piece in pieces[1::2]] != list(range(len(messages))):
        return None
    fragments = pieces[0::2]
    spans: list[Span] = []
    position = len(fragments[0])
    rebuilt = fragments[0]
    for message, fragment in zip(messages, fragments[1:], strict=True):
        content = message.content
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(form + fragment, position):
                break
        else:
            return None
        spans.append((position, position + len(form)))
        position += len(form + fragment)
        rebuilt += form + fragment
    return spans if rebuilt == text else None
