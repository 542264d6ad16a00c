"""From an example to token ids and labels, by the template's own structure.

An assistant turn is found by rendering the conversation before it (with the generation prompt) and after it: what
the second has more is the answer and its stop token. The ids before an answer are therefore exactly those that a
server sends as the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.checks import RowChecks
from lorasmith.engine.data.encoding import Encoder, WholeTexts, encode_texts, encoder_of
from lorasmith.engine.data.template_forms import Conversation, forms_of
from lorasmith.engine.data.template_limits import check_lengths, check_template, limits
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.data import CheckName, Example, Message

Tools = list[dict[str, Any]]


@dataclass(frozen=True)
class RenderedExample:
    """`ids` are the tokens; `trained[i]` says whether token i carries loss (is predicted from those before it)."""

    row: int
    ids: list[int]
    trained: list[bool]
    overridden: tuple[CheckName, ...] = ()

    @property
    def trained_tokens(self) -> int:
        return sum(self.trained[1:])  # the first token has nothing before it


class Turn(NamedTuple):
    """Text since the turn before, the answer with what ends it, all that a server sends before this answer, and
    whether the answer is trained."""

    context: str
    answer: str
    served: str
    trained: bool

    def compared(self) -> list[str]:
        """The served text, where it is more than the context and so might have other tokens than its pieces."""
        return [self.served] if self.served != self.context else []


def render_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool, tools: Tools | None = None
) -> str:
    """The conversation as text; `prompt` ends it where the assistant's next turn begins. `tools` are those offered."""
    return render_all(tokenizer, [messages], prompt, tools)[0]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that already holds its special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None = None
) -> list[int]:
    """What a server feeds before the assistant's next turn."""
    return encode(tokenizer, render_text(tokenizer, messages, prompt=True, tools=tools))


class Draft(NamedTuple):
    """An example as text. A plain text has no turns."""

    example: Example
    checks: RowChecks
    turns: list[Turn]

    def texts(self) -> list[str]:
        """What is tokenised, in the order in which `assemble` takes it."""
        return [text for turn in self.turns for text in (turn.context, turn.answer, *turn.compared())]


def render_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, stop_ids: set[int], allow: Collection[CheckName] = ()
) -> RenderedExample:
    """Ids and trained flags of one example. Raises `CheckFailed` for the first check that fails and is not in `allow`."""
    drafts = draft_all(tokenizer, [example], allow)
    return assemble(tokenizer, drafts, encode_drafts(WholeTexts(tokenizer), drafts), stop_ids)[0]


def render_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    stop_ids: set[int],
    allow: Collection[CheckName] = (),
) -> list[RenderedExample]:
    """Each example as `render_example` gives it, tokenised together."""
    drafts = draft_all(tokenizer, examples, allow)
    return assemble(tokenizer, drafts, encode_drafts(encoder_of(tokenizer), drafts), stop_ids)


def draft_all(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], allow: Collection[CheckName]
) -> list[Draft]:
    """Raises `CheckFailed` for what a row fails as text and is not in `allow`."""
    drafts = []
    for example, texts in zip(examples, render_answers(tokenizer, examples), strict=True):
        checks = RowChecks(example.row, allow)
        if example.messages is not None:
            check_special_tokens(tokenizer, example.messages, checks)
        drafts.append(Draft(example, checks, turns_of(tokenizer, example, texts, checks)))
    return drafts


@dataclass(frozen=True)
class Encoded:
    """Ids of the texts of conversations, and of plain texts with what the tokenizer adds to them, in order."""

    turns: list[list[int]]
    plain: list[list[int]]


def encode_drafts(encoder: Encoder, drafts: Sequence[Draft]) -> Encoded:
    plain = [draft.example.text or "" for draft in drafts if draft.example.messages is None]
    return Encoded(
        encoder.encode([text for draft in drafts for text in draft.texts()]),
        encode_texts(encoder.tokenizer, plain, add_special_tokens=True),
    )


def assemble(
    tokenizer: PreTrainedTokenizerBase,
    drafts: Sequence[Draft],
    encoded: Encoded,
    stop_ids: set[int],
) -> list[RenderedExample]:
    """The examples of drafts from what `encode_drafts` gives for them."""
    turns, plain = iter(encoded.turns), iter(encoded.plain)
    return [
        completion(tokenizer, one.example, next(plain))
        if one.example.messages is None
        else assemble_turns(one, turns, stop_ids)
        for one in drafts
    ]


def assemble_turns(draft: Draft, encoded: Iterator[list[int]], stop_ids: set[int]) -> RenderedExample:
    checks = draft.checks
    ids: list[int] = []
    trained: list[bool] = []
    for turn in draft.turns:
        context, answer, *served = [next(encoded) for _ in range(2 + len(turn.compared()))]
        if served and ids + context != served[0]:
            checks.fail(
                "prompt-differs-when-served", "the prompt has other token ids in training than when it is served"
            )
        stops = [answer.index(token) for token in stop_ids if token in answer]
        stop = min(stops) if stops else None
        if stop is None and not turn.trained:
            stop = len(answer) - 1
        if stop is None:
            checks.fail(
                "stop-token-not-trained",
                "the chat template ends an answer without a stop token, so the model would never stop",
            )
            stop = len(answer) - 1
        ids += context + answer
        trained += [False] * len(context)
        trained += [turn.trained] * (stop + 1) + [False] * (len(answer) - stop - 1)
    return RenderedExample(draft.example.row, ids, trained, tuple(checks.overridden))


def answered_turns(tokenizer: PreTrainedTokenizerBase, example: Example, checks: RowChecks) -> list[Turn]:
    """One turn for each answer; the pieces in order are the text of the conversation up to its last answer."""
    return turns_of(tokenizer, example, render_answers(tokenizer, [example])[0], checks)


def render_answers(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[list[tuple[str, str]]]:
    """For each answer of each example the conversation before it, as a prompt, and with it; none for a plain text."""
    asked: list[tuple[int, Conversation, Conversation]] = []  # an example's index, and both conversations
    for index, example in enumerate(examples):
        messages = example.messages or []
        asked += [
            (index, messages[:place], messages[: place + 1])
            for place, message in enumerate(messages)
            if message.role == "assistant"
        ]
    found: list[list[tuple[str, str]]] = [[] for _ in examples]
    for tools, group in groupby(asked, key=lambda one: examples[one[0]].tools):
        indices, befores, afters = zip(*group, strict=True)
        rendered = (render_all(tokenizer, befores, True, tools), render_all(tokenizer, afters, False, tools))
        for index, before, after in zip(indices, *rendered, strict=True):
            found[index].append((before, after))
    return found


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], prompt: bool, tools: Tools | None
) -> list[str]:
    """Each conversation as text. Raises `InvalidModel` for a template that takes too long or too much memory."""
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        check_template(template)

    def render(given: Sequence[Conversation]) -> list[str]:
        values = [[message.for_template() for message in messages] for messages in given]
        with limits(len(given)):
            rendered = tokenizer.apply_chat_template(
                values, tools=[*tools] if tools else None, tokenize=False, add_generation_prompt=prompt
            )
        return cast(list[str], rendered)

    special_tokens = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    forms = None if tools or isinstance(templates, dict) else forms_of(templates, special_tokens, prompt)
    texts = forms.render(conversations, render) if forms else render(conversations)
    check_lengths(texts, conversations, tools)
    return texts


def turns_of(
    tokenizer: PreTrainedTokenizerBase, example: Example, texts: Sequence[tuple[str, str]], checks: RowChecks
) -> list[Turn]:
    """Of what `render_answers` gives for the example."""
    messages = example.messages or []
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    turns: list[Turn] = []
    done = ""
    for index, (before, after) in zip(answers, texts, strict=True):
        if not before.startswith(done) or not after.startswith(before):
            checks.fail(
                "template-rewrites-history",
                f"the chat template renders turn {index + 1} differently once it is answered",
            )
            return [last_turn(tokenizer, messages, example.tools)]
        check_calls(messages[index], after[len(before) :], example.row)
        turns.append(Turn(before[len(done) :], after[len(before) :], before, messages[index].is_trained))
        done = after
    return turns


def check_calls(message: Message, rendered: str, row: int) -> None:
    """Raise where the template leaves out a call of a tool: the answer would be trained without it."""
    for call in message.tool_calls or ():
        if call.function.name not in rendered:
            raise InvalidSpec(
                f"row {row}: the chat template does not render the call of {call.function.name!r}",
                hint="choose a model whose template knows tools, or leave rows with calls out",
            )


def last_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None) -> Turn:
    """The whole conversation as the context of its last answer, whatever the template did to earlier ones."""
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    served = render_text(tokenizer, messages[:last], prompt=True, tools=tools)
    after = render_text(tokenizer, messages[: last + 1], prompt=False, tools=tools)
    shared = next((place for place, (a, b) in enumerate(zip(served, after, strict=False)) if a != b), len(served))
    return Turn(after[:shared], after[shared:], served, messages[last].is_trained)


def completion(tokenizer: PreTrainedTokenizerBase, example: Example, ids: list[int]) -> RenderedExample:
    """Plain text: each token trained, and the tokens of beginning and end added unless they are there."""
    if tokenizer.eos_token_id is None:
        raise InvalidSpec("this tokenizer has no end-of-sequence token, so a text could never stop")
    ids = ids[doubled_beginnings(tokenizer, ids) :]
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, int(tokenizer.eos_token_id)]
    return RenderedExample(example.row, ids, [True] * len(ids))


def doubled_beginnings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """1 where the tokenizer has put its BOS token in front of a text that begins with it, else 0."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and list(ids[:2]) == [bos, bos])


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], checks: RowChecks) -> None:
    """A special token inside a message would end or fake a turn."""
    pattern = special_tokens_pattern(tokenizer)
    for message in messages:
        said = message.content
        if message.tool_calls:
            said += "".join(call.model_dump_json() for call in message.tool_calls)
        found = pattern.search(said) if pattern else None
        if found:
            checks.fail("special-token-in-message", f"the {message.role} message holds the special token {found[0]!r}")


@lru_cache(maxsize=8)
def special_tokens_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Every token that the tokenizer marks as special, the turn marks that are in none of its attributes too."""
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted({*marked, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None
