"""What becomes of a row above the limit. Only contents are cut; the template's tokens and stop tokens stay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.checks import CheckFailed
from lorasmith.engine.data.layout import Layout, answered, token_layout
from lorasmith.engine.data.rendering import RenderedExample, render_example
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.data import CheckName, Example, Message, TooLong


@dataclass(frozen=True)
class Rendering:
    """How rows are rendered and how long they may be."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: set[int]
    max_tokens: int
    allow: Collection[CheckName] = ()

    def render(self, example: Example) -> RenderedExample:
        return render_example(self.tokenizer, example, self.stop_ids, self.allow)

    def fits(self, row: RenderedExample) -> bool:
        return len(row.ids) <= self.max_tokens


@dataclass(frozen=True)
class Fitted:
    """A row, the example it was rendered from, and the positions of the tokens that stay.

    `window`: the other tokens are in other windows, none is cut. `context` tokens at its front carry no loss although
    they did in the row: another window trains them.
    """

    example: Example
    whole: RenderedExample
    kept: list[int]
    window: bool = False
    context: int = 0

    @property
    def cut(self) -> int:
        return 0 if self.window else len(self.whole.ids) - len(self.kept)

    @property
    def row(self) -> RenderedExample:
        if len(self.kept) == len(self.whole.ids):
            return self.whole
        trained = [self.whole.trained[position] and index >= self.context for index, position in enumerate(self.kept)]
        ids = [self.whole.ids[position] for position in self.kept]
        return RenderedExample(self.whole.row, ids, trained, self.whole.overridden)


def fit(how: Rendering, example: Example, row: RenderedExample, too_long: TooLong) -> list[Fitted]:
    """The examples that a row becomes: itself where it fits, none where it is dropped or refused.

    Raises `CheckFailed` when the row has no room for a trained token however it is cut.
    """
    if how.fits(row):
        return [Fitted(example, row, list(range(len(row.ids))))]
    if too_long in ("error", "drop"):
        return []
    return CUTS[too_long](how, example, row)


def cut_right(how: Rendering, example: Example, row: RenderedExample) -> list[Fitted]:
    """Cut the ends of the longest contents, each to the same length."""
    layout = token_layout(how.tokenizer, example)
    contents = contents_of(layout, example)
    least = [first_character(layout, content) for content in contents]
    room = how.max_tokens - (len(row.ids) - sum(map(len, contents))) - sum(least)
    if room < 0:
        raise no_room(how, row, contents)
    further = even_lengths([len(content) - length for content, length in zip(contents, least, strict=True)], room)
    cut: set[int] = set()
    for content, first, more in zip(contents, least, further, strict=True):
        length = first + more
        while length < len(content) and layout.inside_character[content[length]]:
            length -= 1
        cut.update(content[length:])
    return [Fitted(example, row, without(row, cut))]


def cut_left(how: Rendering, example: Example, row: RenderedExample) -> list[Fitted]:
    """Leave out the oldest exchanges whole; then cut the beginning of the oldest content of the last one."""
    shorter, kept = example, list(range(len(row.ids)))
    for newer in newer_parts(example):
        rendered = how.render(newer)
        positions = kept_positions(row, rendered)
        if positions is None:
            raise InvalidSpec(
                f"row {example.row}: the chat template writes the last turns differently without the first ones",
                hint="--set training.too_long=right or =drop",
            )
        shorter, kept = newer, positions
        if how.fits(rendered):
            return [Fitted(example, row, kept)]
    layout = token_layout(how.tokenizer, shorter)
    contents = contents_of(layout, shorter)
    systems = [message.role == "system" for message in shorter.messages or ()]
    oldest_first = sorted(range(len(contents)), key=lambda index: systems[index] if systems else False)
    excess = len(kept) - how.max_tokens
    last_characters = [last_character(layout, content) for content in contents]
    if sum(last_characters) < excess:
        raise no_room(how, how.render(shorter), contents)
    cut: set[int] = set()
    for content, last in ((contents[index], last_characters[index]) for index in oldest_first):
        length = max(0, min(excess - len(cut), last))
        while 0 < length < last and layout.inside_character[content[length]]:
            length += 1
        cut.update(content[:length])
    return [Fitted(example, row, [position for index, position in enumerate(kept) if index not in cut])]


def first_character(layout: Layout, content: list[int]) -> int:
    """Tokens of the first character of a content, 0 for an empty one."""
    ends = (index for index in range(1, len(content)) if not layout.inside_character[content[index]])
    return next(ends, len(content))


def last_character(layout: Layout, content: list[int]) -> int:
    """Index of the token with which the last character of a content begins, 0 for an empty one."""
    begins = (index for index in reversed(range(len(content))) if not layout.inside_character[content[index]])
    return next(begins, 0)


def split(how: Rendering, example: Example, row: RenderedExample) -> list[Fitted]:
    """Several examples: of a conversation at exchanges, the system turn in front of each; of a text, windows.

    An exchange that is too long by itself is cut as `right` does. Pieces without a trained answer are left out, where another has one.
    """
    if example.messages is None:
        return windows(how, example, row)
    system, exchanges = exchanges_of(answered(example.messages))
    groups: list[list[Message]] = []
    for exchange in exchanges:
        longer = [*groups[-1], *exchange] if groups else exchange
        if groups and how.fits(how.render(with_messages(example, system + longer))):
            groups[-1] = longer
        else:
            groups.append(exchange)
    trained = [group for group in groups if any(turn.role == "assistant" and turn.is_trained for turn in group)]
    fitted: list[Fitted] = []
    for group in trained or groups:
        piece = with_messages(example, system + group)
        fitted += fit(how, piece, how.render(piece), "right")
    return fitted


def windows(how: Rendering, example: Example, row: RenderedExample) -> list[Fitted]:
    """Each window begins with the last token of the one before, untrained, so that every token is trained once."""
    begins = token_layout(how.tokenizer, example).message[0] is None  # a BOS token stands at the front of each window
    head = [0] if begins else []
    step = how.max_tokens - len(head) - 1
    pieces = [Fitted(example, row, list(range(how.max_tokens)), window=True)]
    for start in range(how.max_tokens, len(row.ids), step):
        positions = [*head, start - 1, *range(start, min(start + step, len(row.ids)))]
        pieces.append(Fitted(example, row, positions, window=True, context=len(head) + 1))
    return pieces


CUTS: dict[str, Callable[[Rendering, Example, RenderedExample], list[Fitted]]] = {
    "left": cut_left,
    "right": cut_right,
    "cut": cut_right,
    "split": split,
}


def contents_of(layout: Layout, example: Example) -> list[list[int]]:
    """Positions of the tokens of each message, empty for an empty one; a text is one message."""
    found = layout.contents()
    count = len(answered(example.messages)) if example.messages is not None else 1
    if not layout.found:
        raise InvalidSpec(
            f"row {example.row}: the chat template changes the messages that it renders, so they cannot be cut",
            hint="--set training.too_long=drop, or a larger --set training.max_seq_length",
        )
    return [found.get(index, []) for index in range(count)]


def even_lengths(lengths: Sequence[int], room: int) -> list[int]:
    """The longest are shortened until the sum is `room`; what cannot be shared out evenly goes to the first of them.

    >>> even_lengths([5, 100, 100], 26)
    [5, 11, 10]
    """
    result = [0] * len(lengths)
    open_ = list(range(len(lengths)))
    while open_:
        share = room // len(open_)
        short = [index for index in open_ if lengths[index] <= share]
        if not short:
            for place, index in enumerate(open_):
                result[index] = share + (place < room % len(open_))
            break
        for index in short:
            result[index] = lengths[index]
            room -= lengths[index]
        open_ = [index for index in open_ if index not in short]
    return result


def exchanges_of(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The leading system turns, and the turns from each user turn to the next one; each has an answer."""
    system = [
        message for index, message in enumerate(messages) if all(m.role == "system" for m in messages[: index + 1])
    ]
    exchanges: list[list[Message]] = []
    for message in messages[len(system) :]:
        if not exchanges or (message.role == "user" and exchanges[-1][-1].role == "assistant"):
            exchanges.append([])
        exchanges[-1].append(message)
    return system, exchanges


def newer_parts(example: Example) -> list[Example]:
    """The conversation without its first exchange, without its first two, … down to the last one."""
    if example.messages is None:
        return []
    system, exchanges = exchanges_of(answered(example.messages))
    return [
        with_messages(example, [*system, *(message for exchange in exchanges[first:] for message in exchange)])
        for first in range(1, len(exchanges))
    ]


def with_messages(example: Example, messages: list[Message]) -> Example:
    return example.model_copy(update={"messages": messages})


def kept_positions(whole: RenderedExample, shorter: RenderedExample) -> list[int] | None:
    """Positions in `whole` of a row that is its beginning and its end, or None when it is not."""
    old = list(zip(whole.ids, whole.trained, strict=True))
    new = list(zip(shorter.ids, shorter.trained, strict=True))
    end = 0
    while end < len(new) and old[-1 - end] == new[-1 - end]:
        end += 1
    head = len(new) - end
    return [*range(head), *range(len(old) - end, len(old))] if old[:head] == new[:head] else None


def without(row: RenderedExample, cut: set[int]) -> list[int]:
    return [position for position in range(len(row.ids)) if position not in cut]


def no_room(how: Rendering, row: RenderedExample, contents: list[list[int]]) -> CheckFailed:
    template = len(row.ids) - sum(map(len, contents))
    return CheckFailed(
        "no-trained-token",
        row.row,
        f"no trained token fits into {how.max_tokens} tokens: {template} are the template's, and no message may be empty",
    )
