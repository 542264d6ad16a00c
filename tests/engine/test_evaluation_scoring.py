"""Losses equal those that transformers computes from labels; the same tokens are scored with and without examples."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.engine.data.examples import read_examples
from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.evaluation.cases import few_shot, make_cases
from lorasmith.engine.evaluation.scoring import Score, perplexity, score_examples
from lorasmith.errors import Interrupted, InvalidData, InvalidModel
from lorasmith.schemas.data import Example, Message
from tests.engine.small_jobs import counting_examples


@pytest.fixture(scope="module")
def model(qwen2_folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(qwen2_folder, dtype=torch.float32)
    return loaded.eval()


def rendered_examples(count: int) -> list[RenderedExample]:
    """Random ids of unequal lengths, each with several trained stretches."""
    rng = random.Random(0)
    rows = []
    for row in range(count):
        length = rng.randrange(2, 40)
        trained = [rng.random() < 0.4 for _ in range(length - 1)] + [True]
        rows.append(RenderedExample(row, [rng.randrange(2048) for _ in range(length)], trained))
    return rows


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_equal_the_loss_of_transformers(model: PreTrainedModel, batch_size: int) -> None:
    examples = rendered_examples(11)
    scores = score_examples(model, examples, batch_size=batch_size)
    for example, score in zip(examples, scores, strict=True):
        labels = torch.tensor(
            [[token if flag else -100 for token, flag in zip(example.ids, example.trained, strict=True)]]
        )
        with torch.no_grad():
            output = model(input_ids=torch.tensor([example.ids]), labels=labels)
        shifted = labels[0, 1:]
        right = (output.logits[0, :-1].argmax(-1) == shifted)[shifted != -100]
        assert score.loss == pytest.approx(output.loss.item(), abs=1e-5)  # float32, up to 40 terms
        assert score.token_accuracy == pytest.approx(right.float().mean().item(), abs=1e-6)
        assert score.tokens == example.trained_tokens


def test_perplexity_weighs_tokens_not_examples() -> None:
    assert perplexity([Score(4.0, 0, 1), Score(0.0, 3, 3)]) == pytest.approx(math.e, rel=1e-12)  # 4 nats over 4 tokens


def test_perplexity_beyond_a_float_is_absent() -> None:
    assert perplexity([Score(1e6, 0, 1)]) is None


def test_an_example_without_a_trained_token_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(InvalidData, match="row 5 has no trained token, so it has no loss"):
        score_examples(model, [RenderedExample(5, [1, 2], [True, False])], batch_size=1)


def test_a_model_with_broken_weights_is_named(qwen2_folder: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(qwen2_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InvalidModel, match="the model gives row 0 a loss of nan"):
        score_examples(broken, rendered_examples(1), batch_size=1)


def test_a_request_to_stop_is_obeyed_before_the_next_batch(model: PreTrainedModel) -> None:
    with pytest.raises(Interrupted, match="stopped on request while losses were measured"):
        score_examples(model, rendered_examples(2), batch_size=1, should_stop=lambda: True)


def test_examples_in_the_prompt_leave_the_scored_tokens_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    stop_ids = {tokenizer.eos_token_id}
    cases, _ = make_cases(tokenizer, counting_examples(6), stop_ids, None)
    shown = few_shot(tokenizer, cases, counting_examples(5, first=50), shots=2, stop_ids=stop_ids, context=None)
    assert [shot.row for shot in shown.shots] == [51, 52]
    for case, longer in zip(cases, shown.cases, strict=True):
        assert longer.prompt is not None
        assert case.prompt is not None
        assert trained_ids(longer.rendered) == trained_ids(case.rendered)
        assert longer.rendered.ids[: len(longer.prompt)] == longer.prompt
        assert longer.prompt[-len(case.prompt) :] == case.prompt
        assert "Count from 50." in tokenizer.decode(longer.prompt)


def trained_ids(rendered: RenderedExample) -> list[int]:
    return [token for token, flag in zip(rendered.ids, rendered.trained, strict=True) if flag]


def test_the_system_message_stays_in_front_of_the_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    stop_ids = {tokenizer.eos_token_id}
    question = counting_examples(1)[0]
    assert question.messages is not None
    with_system = question.model_copy(
        update={"messages": [Message(role="system", content="Be brief."), *question.messages]}
    )
    cases, _ = make_cases(tokenizer, [with_system], stop_ids, None)
    shown = few_shot(tokenizer, cases, counting_examples(1, first=50), shots=1, stop_ids=stop_ids, context=None)
    prompt = tokenizer.decode(shown.cases[0].prompt or [])
    assert prompt.index("Be brief.") < prompt.index("Count from 50.") < prompt.index("Count from 0.")


def test_the_shortest_examples_are_shown_when_the_first_do_not_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    stop_ids = {tokenizer.eos_token_id}
    cases, _ = make_cases(tokenizer, counting_examples(1), stop_ids, None)
    candidates = counting_examples(5, first=54)[::-1]  # the longest answers first
    shortest, _ = make_cases(tokenizer, counting_examples(1, first=55), stop_ids, None)
    room = len(cases[0].rendered.ids) + len(shortest[0].rendered.ids)
    shown = few_shot(tokenizer, cases, candidates, shots=1, stop_ids=stop_ids, context=room)
    assert [shot.answer() for shot in shown.shots] == ["55"]


def test_examples_that_never_fit_are_left_out_with_the_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    stop_ids = {tokenizer.eos_token_id}
    cases, _ = make_cases(tokenizer, counting_examples(1), stop_ids, None)
    shown = few_shot(tokenizer, cases, counting_examples(4, first=50), shots=3, stop_ids=stop_ids, context=24)
    assert shown.cases == []
    assert shown.reason is not None
    assert shown.reason.startswith("with the 3 shortest training examples in front, the longest conversation has")
    assert shown.reason.endswith("the context is 24")


def test_an_example_that_is_measured_is_never_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    stop_ids = {tokenizer.eos_token_id}
    cases, _ = make_cases(tokenizer, counting_examples(3), stop_ids, None)
    shown = few_shot(tokenizer, cases, counting_examples(4), shots=2, stop_ids=stop_ids, context=None)
    assert shown.reason == "2 training examples were asked for, 1 can be used"


def test_rows_longer_than_the_context_are_left_out_and_named(tokenizer: PreTrainedTokenizerBase) -> None:
    long = Example(id="f", group="f", row=9, messages=[
        Message(role="user", content="count " * 80), Message(role="assistant", content="no"),
    ])  # fmt: skip
    cases, left_out = make_cases(tokenizer, [*counting_examples(2), long], {tokenizer.eos_token_id}, 64)
    assert [case.example.row for case in cases] == [1, 2]
    assert len(left_out) == 1
    assert left_out[0].startswith("row 9: ")
    assert left_out[0].endswith(" tokens with its answer, the context is 64")


def test_nothing_that_fits_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidData, match="none of the 2 examples can be measured; row 1: .* the context is 4"):
        make_cases(tokenizer, counting_examples(2), {tokenizer.eos_token_id}, 4)


def test_a_damaged_examples_file_is_refused_by_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(counting_examples(1)[0].model_dump_json() + '\n{"id": "b", "group": "b", "text": "x"}\n')
    with pytest.raises(InvalidData, match=r"test\.jsonl, line 2: row: Field required"):
        read_examples(path)
