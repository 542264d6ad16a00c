"""Conversations of one form, the same roles in the same order, as a chat template's words with places for the contents.

Rendering costs a short row more than tokenising it. Where a template only writes contents between its words
(`template_flow.py`), it renders each form once, and a conversation is those words joined with its contents.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lorasmith.engine.data.template_flow import Flow, content_flow
from lorasmith.errors import InvalidModel
from lorasmith.schemas.data import Message, Role

MOST_MESSAGES = 16  # in longer conversations few have one form, and rendering is a small part of the work
MOST_FORMS = 1024
# Of each content; a template that writes them more often renders each conversation, within its limits.
TIMES_WRITTEN = 2

Conversation = Sequence[Message]
Key = tuple[tuple[Role, bool], ...]  # of each message its role, and whether it has a content
Render = Callable[[Sequence[Conversation]], list[str]]


@dataclass(frozen=True)
class Form:
    """`places[n]` is the message whose content stands between `words[n]` and `words[n + 1]`."""

    words: list[str]
    places: list[int]

    def text(self, conversation: Conversation) -> str:
        parts = [self.words[0]]
        for place, words in zip(self.places, self.words[1:], strict=True):
            parts += (conversation[place].content, words)
        return "".join(parts)


@dataclass
class Forms:
    """Those that a template was given so far. What it does itself is `render`."""

    flow: Flow
    known: dict[Key, Form | None] = field(default_factory=dict)

    def render(self, conversations: Sequence[Conversation], render: Render) -> list[str]:
        """Each conversation as text. One of each call is rendered as well, and compared."""
        if len(self.known) > MOST_FORMS:
            self.known.clear()
        texts: list[str | None] = []
        for conversation in conversations:
            key = self.key(conversation)
            if key is not None and key not in self.known:
                self.known[key] = form_of(key, render)
            form = None if key is None else self.known[key]
            texts.append(form.text(conversation) if form else None)
        compared = next((place for place, text in enumerate(texts) if text is not None), None)
        rest = [place for place, text in enumerate(texts) if text is None or place == compared]
        rendered = dict(zip(rest, render([conversations[place] for place in rest]), strict=True))
        if compared is not None and texts[compared] != rendered[compared]:
            raise InvalidModel("the chat template makes another text of a conversation each time it is rendered")
        return [rendered[place] if text is None else text for place, text in enumerate(texts)]

    def key(self, conversation: Conversation) -> Key | None:
        """The form of the conversation; None where it has to be rendered."""
        if len(conversation) > MOST_MESSAGES:
            return None
        parts = []
        for message in conversation:
            content = message.content
            if message.has_more_than_content or (self.flow.trims and content != content.strip()):
                return None
            parts.append((message.role, content != ""))
        return tuple(parts)


def form_of(key: Key, render: Render) -> Form | None:
    mark = secrets.token_hex(16)  # of its own, as no template can know it
    conversation = [
        Message(role=role, content=f"{mark}:{place};" if filled else "") for place, (role, filled) in enumerate(key)
    ]
    words, places = [], []
    for number, part in enumerate(re.split(f"{mark}:([0-9]+);", render([conversation])[0])):
        if number % 2:
            places.append(int(part))
        else:
            words.append(part)
    return Form(words, places) if len(places) <= TIMES_WRITTEN * len(key) else None


@lru_cache(maxsize=8)
def forms_of(template: str, special_tokens: tuple[tuple[str, str], ...], prompt: bool) -> Forms | None:
    """Those of the template with these special tokens, kept between calls; None where it looks into contents.

    `prompt`: whether it writes the beginning of the next answer too.
    """
    flow = content_flow(template)
    return Forms(flow) if flow else None
