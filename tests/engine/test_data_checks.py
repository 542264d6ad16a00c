"""Checks before training: each fails by name over all rows, says the way out, and can be overridden by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data.checks import ALL_CHECKS, CHECKS, CheckFailed
from lorasmith.engine.data.parts import RenderedPart, render_part
from lorasmith.engine.data.rendering import prompt_ids, render_example
from lorasmith.files import read_json
from lorasmith.schemas.data import CheckName, Example
from tests.engine.chat_templates import SHAPES, conversation, shaped_tokenizer
from tests.engine.small_jobs import events, run_engine, write_examples

QUESTION = conversation(("user", "a"), ("assistant", "b"), row=3)
FORGETFUL = (  # earlier answers are left out, as templates of thinking models leave out thoughts
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rendered(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], stops: set[int], allow: list[CheckName] | None = None
) -> RenderedPart:
    return render_part(tokenizer, examples, stops, max_tokens=512, too_long="error", allow=allow or [])


def failure(tokenizer: PreTrainedTokenizerBase, examples: list[Example], stops: set[int]) -> CheckFailed:
    with pytest.raises(CheckFailed) as raised:
        rendered(tokenizer, examples, stops)
    return raised.value


def with_template(starter: Path, template: str) -> tuple[PreTrainedTokenizerBase, set[int]]:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(starter)
    tokenizer.chat_template = template
    return tokenizer, {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]


def trained_text(tokenizer: PreTrainedTokenizerBase, part: RenderedPart) -> str:
    row = part.rows[-1]
    return str(tokenizer.decode([token for token, trains in zip(row.ids, row.trained, strict=True) if trains]))


def test_every_check_has_a_way_out_and_an_override() -> None:
    assert set(CHECKS) == ALL_CHECKS


@pytest.mark.parametrize("name", SHAPES)
def test_the_templates_of_real_models_pass_every_check(starter: Path, name: str) -> None:
    tokenizer, stops = shaped_tokenizer(starter, SHAPES[name])
    system = [("system", "Be brief.")] if SHAPES[name].system else []
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2\n\n22")]
    part = rendered(tokenizer, [conversation(*system, *turns)], stops)
    stop = SHAPES[name].stop
    space = " " if name == "mistral" else ""
    assert trained_text(tokenizer, part) == f"{space}1{stop}{space}2\n\n22{stop}"
    assert part.warnings() == []


def test_a_template_without_a_stop_token_fails(starter: Path) -> None:
    endless, stops = with_template(starter, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    failed = failure(endless, [QUESTION, conversation(("user", "c"), ("assistant", "d"), row=4)], stops)
    assert failed.message == (
        "row 3: the chat template ends an answer without a stop token, so the model would never stop "
        "(check `stop-token-not-trained`, failed by 2 of 2 rows)"
    )
    assert failed.hint == (
        "choose a template whose answers end with the tokenizer's eos token: --template chatml; or train the answer "
        "without an end: --set 'training.allow=[stop-token-not-trained]'"
    )
    part = rendered(endless, [QUESTION], stops, allow=["stop-token-not-trained"])
    assert trained_text(endless, part) == "b\n"
    assert part.warnings() == [
        "check `stop-token-not-trained` is overridden for 1 of 1 rows: train the answer without an end"
    ]


def test_a_turn_mark_that_is_not_the_eos_token_is_found_in_a_message(starter: Path) -> None:
    tokenizer, stops = shaped_tokenizer(starter, SHAPES["llama-3"])
    example = conversation(("user", "Hi<|start_header_id|>system"), ("assistant", "no"))
    tokenizer.additional_special_tokens = []  # Llama 3 lists its marks in no attribute of the tokenizer
    failed = failure(tokenizer, [example], stops)
    assert failed.check == "special-token-in-message"
    assert "row 7: the user message holds the special token '<|start_header_id|>'" in failed.message
    part = rendered(tokenizer, [example], stops, allow=["special-token-in-message"])
    assert part.rows[0].ids.count(int(tokenizer.convert_tokens_to_ids("<|start_header_id|>"))) == 3  # type: ignore[arg-type]


def test_a_template_that_rewrites_history_fails_or_trains_the_last_answer(starter: Path) -> None:
    forgetful, stops = with_template(starter, FORGETFUL)
    example = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    failed = failure(forgetful, [example], stops)
    assert failed.check == "template-rewrites-history"
    assert "row 7: the chat template renders turn 4 differently once it is answered" in failed.message
    part = rendered(forgetful, [example], stops, allow=["template-rewrites-history"])
    assert trained_text(forgetful, part) == "d<|im_end|>"
    served = prompt_ids(forgetful, example.prompt_messages())
    assert part.rows[0].ids[: len(served)] == served


def test_a_generation_prompt_that_answers_do_not_have_differs_when_served(starter: Path) -> None:
    template = SHAPES["chatml"].template.replace(
        "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}"
    )
    tokenizer, stops = with_template(starter, template)
    allow: list[CheckName] = ["template-rewrites-history"]
    with pytest.raises(CheckFailed, match=r"row 3: the prompt has other token ids in training than when it is served"):
        rendered(tokenizer, [QUESTION], stops, allow=allow)
    part = rendered(tokenizer, [QUESTION], stops, allow=[*allow, "prompt-differs-when-served"])
    assert trained_text(tokenizer, part) == "b<|im_end|>"


def test_every_row_is_checked_against_what_a_server_sends(starter: Path) -> None:
    tokenizer, stops = shaped_tokenizer(starter, SHAPES["chatml"])
    fine = [conversation(("user", "a"), ("assistant", "b"), row=row) for row in range(1, 300)]
    # a new line behind the header's own is one token with it in a history, and two at the end of a prompt
    bad = conversation(("user", "a"), ("assistant", "\n b"), ("user", "c"), ("assistant", "d"), row=300)
    failed = failure(tokenizer, [*fine, bad], stops)
    assert failed.message == (
        "row 300: the prompt has other token ids in training than when it is served "
        "(check `prompt-differs-when-served`, failed by 1 of 300 rows)"
    )


def test_an_empty_text_trains_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    stops = {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]
    empty = Example(id="0", group="0", row=5, text="")
    failed = failure(tokenizer, [QUESTION, empty], stops)
    assert "row 5: no trained token within 512 tokens: no answer is left (check `no-trained-token`" in failed.message
    part = rendered(tokenizer, [QUESTION, empty], stops, allow=["no-trained-token"])
    assert (len(part.rows), part.dropped) == (1, 1)


def test_several_failing_checks_are_counted_in_one_error(starter: Path) -> None:
    tokenizer, stops = shaped_tokenizer(starter, SHAPES["chatml"])
    marked = conversation(("user", "<|im_end|>"), ("assistant", "b"), row=1)
    differs = conversation(("user", "a"), ("assistant", "\n b"), ("user", "c"), ("assistant", "d"), row=2)
    failed = failure(tokenizer, [marked, differs], stops)
    assert failed.message == (
        "row 1: the user message holds the special token '<|im_end|>' "
        "(check `special-token-in-message`, failed by 1 of 2 rows; check `prompt-differs-when-served` 1)"
    )


def test_evaluation_fails_on_the_same_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    example = conversation(("user", "<|im_end|>"), ("assistant", "b"))
    with pytest.raises(CheckFailed, match=r"row 7: .* \(check `special-token-in-message`\)"):
        render_example(tokenizer, example, {int(tokenizer.eos_token_id)})  # type: ignore[arg-type]


def test_a_run_reports_what_it_cut_and_which_checks_were_overridden(
    training_job: Callable[..., Path], qwen2_folder: Path
) -> None:
    folder = training_job(
        qwen2_folder,
        max_seq_length=32,
        max_steps=1,
        too_long="right",
        allow=["special-token-in-message", "no-trained-token"],
    )
    rows = [
        conversation(("user", "a"), ("assistant", "b " * 100), row=1),
        conversation(("user", "<|im_end|>"), ("assistant", "b"), row=2),
        conversation(*[("user", "a"), ("assistant", "b")] * 9, row=3),
    ]
    write_examples(Path(read_json(folder / "job.json")["inputs"]["train_file"]), rows)
    run_engine(folder)
    (reported,) = events(folder, "rows")
    assert {key: reported[key] for key in ("train", "cut", "split", "dropped")} == {
        "train": 2,
        "cut": 1,
        "split": 0,
        "dropped": 1,
    }
    assert reported["cut_tokens"] > 60
    warnings = [event["text"] for event in events(folder, "warning")]
    assert "check `special-token-in-message` is overridden for 1 of 3 rows: read it as the special token" in warnings
    assert "check `no-trained-token` is overridden for 1 of 3 rows: leave such rows out" in warnings
