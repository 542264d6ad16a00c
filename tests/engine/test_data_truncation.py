"""A row above the limit: only contents are cut, whatever the template looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data.checks import CheckFailed
from lorasmith.engine.data.layout import token_layout
from lorasmith.engine.data.parts import render_part
from lorasmith.engine.data.rendering import RenderedExample, render_text
from lorasmith.engine.data.truncation import Rendering, even_lengths, exchanges_of, fit
from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.schemas.data import Example, TooLong
from lorasmith.starter.location import starter_model
from tests.engine.chat_templates import SHAPES, conversation, shaped_tokenizer

TOKENIZERS = {name: shaped_tokenizer(starter_model(), shape) for name, shape in SHAPES.items()}

words = st.lists(
    st.sampled_from(
        ["order", " bicycle", "\n", "  ", "é", "世界", "🙂", "1,234", "user", "assistant\n", "[INST]", "x"]
    ),
    min_size=1,
    max_size=30,
).map("".join)


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, Example]:
    """A template's name and a conversation that it takes."""
    name = draw(st.sampled_from(sorted(SHAPES)))
    turns = [("system", draw(words))] if SHAPES[name].system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [("user", draw(words)), ("assistant", draw(words))]
    return name, conversation(*turns)


def rendering(name: str, max_tokens: int) -> Rendering:
    tokenizer, stops = TOKENIZERS[name]
    return Rendering(tokenizer, stops, max_tokens, allow=["prompt-differs-when-served"])


def template_ids(how: Rendering, example: Example, row: RenderedExample) -> list[int]:
    message = token_layout(how.tokenizer, example).message
    return [token for token, index in zip(row.ids, message, strict=True) if index is None]


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


def trained(row: RenderedExample) -> list[int]:
    return [token for token, trains in zip(row.ids, row.trained, strict=True) if trains]


@settings(max_examples=150, deadline=None)
@given(rows())
def test_the_layout_tells_every_token_of_a_message_from_the_templates(case: tuple[str, Example]) -> None:
    name, example = case
    how = rendering(name, 10_000)
    row = how.render(example)
    layout = token_layout(how.tokenizer, example)
    assert len(layout.texts) == len(row.ids)
    assert "".join(layout.texts) == how.tokenizer.decode(row.ids)
    texts = ["" for _ in example.messages or ()]
    for text, index in zip(layout.texts, layout.message, strict=True):
        if index is not None:
            texts[index] += text
    for message, text in zip(example.messages or (), texts, strict=True):
        assert text in message.content  # shorter where a token reaches over the border
    for token, index in zip(row.ids, layout.message, strict=True):
        if token in how.tokenizer.all_special_ids:
            assert index is None


@settings(max_examples=200, deadline=None)
@given(rows(), st.sampled_from(["left", "right", "cut", "split"]), st.integers(8, 90))
def test_whatever_is_cut_the_template_and_the_stop_tokens_stay(
    case: tuple[str, Example], policy: TooLong, max_tokens: int
) -> None:
    name, example = case
    how = rendering(name, max_tokens)
    row = how.render(example)
    try:
        fitted = fit(how, example, row, policy)
    except CheckFailed as failure:
        if failure.check == "no-trained-token":
            return
        raise
    assert fitted
    for piece in fitted:
        cut = piece.row
        assert len(cut.ids) <= max_tokens
        assert is_subsequence(trained(cut), trained(row))
        ends = [token in how.stop_ids for token in trained(cut)]
        assert ends[-1]  # the last answer still stops
        template = template_ids(how, piece.example, piece.whole)
        if policy == "left":
            assert is_subsequence(
                template_ids(how, last_exchange(example), how.render(last_exchange(example))), cut.ids
            )
        else:
            assert is_subsequence(template, cut.ids)
    stops = [token for piece in fitted for token in trained(piece.row) if token in how.stop_ids]
    if policy != "left":  # which leaves out exchanges whole
        assert stops == [token for token in trained(row) if token in how.stop_ids]
    if policy == "split" and len(fitted) > 1 and not any(piece.cut for piece in fitted):
        assert [token for piece in fitted for token in trained(piece.row)] == trained(row)


def last_exchange(example: Example) -> Example:
    system, exchanges = exchanges_of(example.messages or [])
    return example.model_copy(update={"messages": system + exchanges[-1]})


@settings(max_examples=60, deadline=None)
@given(words, st.integers(8, 40), st.sampled_from(["left", "right", "split"]))
def test_a_text_keeps_its_end_and_its_windows_train_each_token_once(
    text: str, max_tokens: int, policy: TooLong
) -> None:
    how = rendering("chatml", max_tokens)
    example = Example(id="0", group="0", row=1, text=text)
    row = how.render(example)
    fitted = fit(how, example, row, policy)
    assert all(len(piece.row.ids) <= max_tokens for piece in fitted)
    assert trained(fitted[-1].row)[-1] in how.stop_ids
    if policy == "split":
        assert [token for piece in fitted for token in trained(piece.row)] == row.ids
        assert sum(piece.row.trained_tokens for piece in fitted) == row.trained_tokens
        assert not any(piece.cut for piece in fitted)
    else:
        assert len(fitted) == 1
        assert is_subsequence(fitted[0].row.ids, row.ids)
        assert fitted[0].cut == len(row.ids) - len(fitted[0].row.ids)


@pytest.mark.parametrize("name", SHAPES)
def test_right_shortens_the_longest_message_and_leaves_the_others(name: str) -> None:
    example = conversation(("user", "one two three " * 40), ("assistant", "Four."))
    how = rendering(name, 60)
    (piece,) = fit(how, example, how.render(example), "right")
    text = str(how.tokenizer.decode(piece.row.ids))
    assert len(piece.row.ids) == 60
    assert text.rstrip().endswith("Four." + SHAPES[name].stop)
    assert "one two three one" in text
    assert str(how.tokenizer.decode(trained(piece.row))).strip() == "Four." + SHAPES[name].stop


@pytest.mark.parametrize("name", SHAPES)
def test_left_leaves_out_the_oldest_exchanges_as_a_server_would(name: str) -> None:
    turns = [("user", "Old question? " * 10), ("assistant", "Old answer."), ("user", "New?"), ("assistant", "Yes.")]
    system = [("system", "Be brief.")] if SHAPES[name].system else []
    example = conversation(*system, *turns)
    how = rendering(name, 45)
    (piece,) = fit(how, example, how.render(example), "left")
    assert piece.row.ids == how.render(conversation(*system, *turns[2:])).ids
    assert piece.cut == len(how.render(example).ids) - len(piece.row.ids)


def test_left_cuts_the_beginning_of_the_prompt_when_one_exchange_is_too_long() -> None:
    example = conversation(("system", "Be brief."), ("user", "first " * 100 + "last?"), ("assistant", "Yes."))
    how = rendering("chatml", 60)
    (piece,) = fit(how, example, how.render(example), "left")
    text = str(how.tokenizer.decode(piece.row.ids))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("last?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n")
    assert len(piece.row.ids) == 60


def test_split_puts_the_system_turn_in_front_of_each_example() -> None:
    turns = [("user", "Question? " * 5), ("assistant", "Answer. " * 5)] * 4
    example = conversation(("system", "Be brief."), *turns)
    how = rendering("llama-3", 120)
    fitted = fit(how, example, how.render(example), "split")
    assert len(fitted) > 1
    for piece in fitted:
        assert str(how.tokenizer.decode(piece.row.ids)).count("Be brief.") == 1


@pytest.mark.parametrize("policy", ["left", "right"])
def test_a_cut_never_splits_a_character_and_leaves_one_of_each_message(policy: TooLong) -> None:
    example = conversation(("user", "?"), ("assistant", "🙂世" * 60))
    lengths = set()
    for max_tokens in range(10, 40):
        how = rendering("chatml", max_tokens)
        try:
            (piece,) = fit(how, example, how.render(example), policy)
        except CheckFailed:
            continue
        lengths.add(max_tokens)
        text = str(how.tokenizer.decode(piece.row.ids))
        assert "\N{REPLACEMENT CHARACTER}" not in text
        assert "🙂" in text or "世" in text
        assert len(piece.row.ids) <= max_tokens
    assert max(lengths) - min(lengths) + 1 == len(lengths) > 10  # the shortest ones have no room


def test_split_leaves_out_exchanges_that_train_nothing_where_others_do() -> None:
    turns = [("user", "Question? " * 5), ("assistant", "Answer. " * 5)] * 2
    example = conversation(*turns)
    assert example.messages is not None
    example.messages[1].weight = 0
    how = rendering("chatml", 50)
    (piece,) = fit(how, example, how.render(example), "split")
    assert piece.row.trained_tokens > 0
    example.messages[3].weight = 0
    assert [piece.row.trained_tokens for piece in fit(how, example, how.render(example), "split")] == [0, 0]


def test_a_text_that_begins_with_its_bos_token_has_one(starter: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(starter)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = int(tokenizer.convert_tokens_to_ids("<s>"))  # type: ignore[arg-type]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    how = Rendering(tokenizer, {int(tokenizer.eos_token_id)}, 20)  # type: ignore[arg-type]
    plain, rendered = (
        Example(id="0", group="0", row=1, text=begin + "def parse(value): return int(value) " * 5)
        for begin in ("", "<s>")
    )
    row = how.render(rendered)
    assert row.ids == how.render(plain).ids
    assert row.ids.count(bos) == 1
    assert token_layout(tokenizer, rendered).message == token_layout(tokenizer, plain).message
    assert len(token_layout(tokenizer, rendered).message) == len(row.ids)
    for policy in ("left", "right", "split"):
        pieces = [[piece.row for piece in fit(how, one, how.render(one), policy)] for one in (plain, rendered)]
        assert pieces[0] == pieces[1]


def test_a_row_whose_template_alone_is_too_long_fails_by_name() -> None:
    example = conversation(*[("user", "a"), ("assistant", "b")] * 10)
    tokenizer, stops = TOKENIZERS["chatml"]
    with pytest.raises(
        CheckFailed, match=r"row 7: no trained token fits into 20 tokens: \d+ are the template's"
    ) as raised:
        render_part(tokenizer, [example], stops, max_tokens=20, too_long="right")
    assert raised.value.hint is not None
    assert "or leave such rows out: --set 'training.allow=[no-trained-token]'" in raised.value.hint
    short = conversation(("user", "a"), ("assistant", "b"), row=8)
    part = render_part(tokenizer, [example, short], stops, max_tokens=20, too_long="right", allow=["no-trained-token"])
    assert (len(part.rows), part.dropped) == (1, 1)
    assert part.warnings() == ["check `no-trained-token` is overridden for 1 of 2 rows: leave such rows out"]


def test_a_template_that_changes_the_messages_can_refuse_to_be_cut(starter: Path) -> None:
    tokenizer, stops = shaped_tokenizer(starter, SHAPES["chatml"])
    tokenizer.chat_template = SHAPES["chatml"].template.replace("m['content']", "m['content'] | upper")
    example = conversation(("user", "a " * 100), ("assistant", "b"))
    with pytest.raises(InvalidSpec, match="row 7: the chat template changes the messages that it renders"):
        render_part(tokenizer, [example], stops, max_tokens=64, too_long="right")


@pytest.mark.parametrize(
    ("policy", "counted"), [("right", (2, 1, 0, 0)), ("left", (2, 1, 0, 0)), ("drop", (1, 0, 0, 1))]
)
def test_each_policy_counts_rows_and_tokens(
    tokenizer: PreTrainedTokenizerBase, policy: TooLong, counted: tuple[int, ...]
) -> None:
    short, long = (
        conversation(("user", "a"), ("assistant", "b")),
        conversation(("user", "a"), ("assistant", "b " * 200)),
    )
    stops = {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]
    whole = render_part(tokenizer, [short, long], stops, max_tokens=1000, too_long="error")
    part = render_part(tokenizer, [short, long], stops, max_tokens=64, too_long=policy)
    assert (len(part.rows), part.cut, part.split, part.dropped) == counted
    if policy != "drop":
        assert part.counts()["cut_tokens"] == whole.tokens - part.tokens > 0


def test_split_rows_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    exchange = [("user", "a " * 20), ("assistant", "b " * 20)]
    stops = {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]
    one = render_part(tokenizer, [conversation(*exchange)], stops, max_tokens=1000, too_long="error").tokens
    part = render_part(tokenizer, [conversation(*exchange * 3)], stops, max_tokens=one + 5, too_long="split")
    assert (len(part.rows), part.cut, part.cut_tokens, part.split, part.dropped) == (3, 0, 0, 1, 0)


def test_a_space_that_the_tokenizer_leaves_out_belongs_to_the_word_behind_it(starter: Path) -> None:
    tokenizer, _ = shaped_tokenizer(starter, SHAPES["chatml"])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    example = conversation(("user", "one two"), ("assistant", " three four"))
    layout = token_layout(tokenizer, example)
    assert "".join(layout.texts) == render_text(tokenizer, example.messages or [], prompt=False)
    assert (
        "".join(text for text, index in zip(layout.texts, layout.message, strict=True) if index == 1) == " three four"
    )


def test_lengths_are_shared_out_evenly() -> None:
    assert even_lengths([5, 100, 100], 26) == [5, 11, 10]
    assert even_lengths([3, 4], 100) == [3, 4]
    assert even_lengths([0, 50], 7) == [0, 7]


def test_nothing_left_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    long = conversation(("user", "a"), ("assistant", "b " * 200))
    with pytest.raises(InvalidData, match="no row is left: all 1 are longer than 64 tokens or train nothing"):
        render_part(tokenizer, [long], {int(tokenizer.eos_token_id)}, max_tokens=64, too_long="drop")  # type: ignore[arg-type]
