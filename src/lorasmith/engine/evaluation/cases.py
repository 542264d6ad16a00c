"""From stored examples to what the model is given: prompts, expected answers, and prompts with examples in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import RenderedExample, prompt_ids, render_example
from lorasmith.errors import InvalidData
from lorasmith.schemas.data import Example, Message


@dataclass(frozen=True)
class Case:
    """One example as one condition sees it. `prompt` is None for plain text, of which each token is scored."""

    example: Example
    rendered: RenderedExample
    prompt: list[int] | None

    def fits(self, context: int | None) -> bool:
        return context is None or len(self.rendered.ids) <= context


@dataclass(frozen=True)
class FewShot:
    """Cases with training examples in the prompt, or no cases and the reason."""

    cases: list[Case]
    shots: list[Example]
    reason: str | None = None


def make_case(tokenizer: PreTrainedTokenizerBase, example: Example, stop_ids: set[int]) -> Case:
    rendered = render_example(tokenizer, example, stop_ids)
    prompt = prompt_ids(tokenizer, example.prompt_messages(), example.tools) if example.messages is not None else None
    return Case(example, rendered, prompt)


def make_cases(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], stop_ids: set[int], context: int | None
) -> tuple[list[Case], list[str]]:
    """Cases that fit the context, and for each of the others a sentence with its row and length."""
    cases = [make_case(tokenizer, example, stop_ids) for example in examples]
    left_out = [
        f"row {case.example.row}: {len(case.rendered.ids)} tokens with its answer, the context is {context}"
        for case in cases
        if not case.fits(context)
    ]
    kept = [case for case in cases if case.fits(context)]
    if not kept:
        raise InvalidData(
            f"none of the {len(examples)} examples can be measured; {left_out[0] if left_out else 'the part is empty'}",
            hint="choose another part with --part, or a model with a longer context",
        )
    return kept, left_out


def few_shot(
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    candidates: Sequence[Example],
    *,
    shots: int,
    stop_ids: set[int],
    context: int | None,
) -> FewShot:
    """The same cases with the first `shots` candidates in front, or the shortest ones when those do not fit.

    An example that is measured is never shown. All cases must fit with their answers, or none is measured: a
    comparison over fewer examples would not be the same comparison.
    """
    if any(case.prompt is None for case in cases):
        return FewShot([], [], "plain texts have no question in front of which examples could stand")
    measured = {case.example.id for case in cases}
    usable = [example for example in candidates if example.messages is not None and example.id not in measured]
    if len(usable) < shots:
        return FewShot([], [], f"{shots} training examples were asked for, {len(usable)} can be used")
    longest = 0
    for choose in (first_ones, shortest_ones):
        chosen = choose(tokenizer, usable, shots, stop_ids)
        shown = [with_shots(tokenizer, case, chosen, stop_ids) for case in cases]
        if all(case.fits(context) for case in shown):
            return FewShot(shown, chosen)
        longest = max(len(case.rendered.ids) for case in shown)
    return FewShot(
        [],
        [],
        f"with the {shots} shortest training examples in front, the longest conversation has {longest} tokens; "
        f"the context is {context}",
    )


def first_ones(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], count: int, stop_ids: set[int]
) -> list[Example]:
    return list(examples[:count])


def shortest_ones(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], count: int, stop_ids: set[int]
) -> list[Example]:
    """The examples of fewest tokens, in the file's order where they are equally long."""
    return sorted(examples, key=lambda example: len(render_example(tokenizer, example, stop_ids).ids))[:count]


def with_shots(tokenizer: PreTrainedTokenizerBase, case: Case, shots: Sequence[Example], stop_ids: set[int]) -> Case:
    """The case with the turns of `shots` between its system message and its question; the same tokens are scored."""
    messages = case.example.messages or []
    leading = 1 if messages[0].role == "system" else 0
    turns: list[Message] = [turn for shot in shots for turn in shot.messages or [] if turn.role != "system"]
    longer = case.example.model_copy(update={"messages": [*messages[:leading], *turns, *messages[leading:]]})
    shown = make_case(tokenizer, longer, stop_ids)
    skip = sum(shown.rendered.trained) - sum(case.rendered.trained)
    trained = []
    for flag in shown.rendered.trained:
        trained.append(flag and skip <= 0)
        skip -= flag
    return Case(case.example, replace(shown.rendered, trained=trained), shown.prompt)
