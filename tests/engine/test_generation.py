"""Greedy answers equal those of transformers, whatever the batch, the padding and the order in which rows stop."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorasmith.engine.models import generation
from lorasmith.engine.models.generation import Generated, LanguageModel, generate_greedy, stream_answer
from lorasmith.errors import Interrupted, InvalidData

VOCABULARY = 97
CONTEXT = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.5,  # wide enough that greedy answers vary and do not hang on ties
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()


def qwen2_with_adapter() -> PeftModel:
    torch.manual_seed(2)
    wrapped = get_peft_model(qwen2(), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    assert isinstance(wrapped, PeftModel)
    return wrapped.eval()


def mistral_with_window() -> PreTrainedModel:
    torch.manual_seed(3)
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)).eval()


MODELS = [llama, qwen2, qwen2_with_adapter, mistral_with_window]


@pytest.fixture(params=MODELS, ids=lambda build: build.__name__)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    built: LanguageModel = request.param()
    return built


def prompts_of_unequal_lengths(count: int = 9, longest: int = 20) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def reference_ids(model: LanguageModel, prompt: list[int], max_new_tokens: int, stop_ids: set[int]) -> list[int]:
    """`generate(do_sample=False)` on the prompt alone, stop token included."""
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=0,
    )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def greedy(model: LanguageModel, prompts: list[list[int]], stop_ids: set[int], batch_size: int = 4) -> list[Generated]:
    return generate_greedy(model, prompts, max_new_tokens=24, stop_ids=stop_ids, pad_id=0, batch_size=batch_size)


def stops_that_occur(model: LanguageModel, prompts: list[list[int]]) -> set[int]:
    """Tokens that end about half of the answers early, at different places."""
    answers = [answer.ids for answer in greedy(model, prompts, set())]
    return {answer[3 + 2 * index] for index, answer in enumerate(answers[: len(answers) // 2])}


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_equal_those_of_transformers(model: LanguageModel, batch_size: int) -> None:
    prompts = prompts_of_unequal_lengths()
    answers = greedy(model, prompts, set(), batch_size)
    assert [answer.ids for answer in answers] == [reference_ids(model, prompt, 24, set()) for prompt in prompts]
    assert not any(answer.stopped for answer in answers)


@pytest.mark.parametrize("compact_share", [0.01, 0.25, 2.0])
def test_rows_that_stop_early_leave_the_others_as_they_are(
    model: LanguageModel, compact_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "COMPACT_SHARE", compact_share)
    prompts = prompts_of_unequal_lengths()
    stop_ids = stops_that_occur(model, prompts)
    answers = greedy(model, prompts, stop_ids, batch_size=16)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference_ids(model, prompt, 24, stop_ids)
        assert answer.stopped == (expected[-1] in stop_ids)
        assert answer.ids == (expected[:-1] if answer.stopped else expected)
    assert any(answer.stopped for answer in answers)
    assert not all(answer.stopped for answer in answers) or len({len(answer.ids) for answer in answers}) > 1


def test_prompts_of_equal_length_need_no_padding_and_give_the_same_answers(model: LanguageModel) -> None:
    prompts = [prompt + [5] * (20 - len(prompt)) for prompt in prompts_of_unequal_lengths()]
    answers = greedy(model, prompts, set())
    assert [answer.ids for answer in answers] == [reference_ids(model, prompt, 24, set()) for prompt in prompts]


def test_an_answer_ends_where_the_context_does() -> None:
    model = llama()
    prompts = [[7] * (CONTEXT - 1), [7] * (CONTEXT - 3), [7] * 4]
    answers = greedy(model, prompts, set())
    assert [len(answer.ids) for answer in answers] == [1, 3, 24]
    assert [answer.stopped for answer in answers] == [False, False, False]


def test_a_prompt_that_fills_the_context_is_refused_by_its_number() -> None:
    with pytest.raises(
        InvalidData, match="prompt 2 has 64 tokens; the model's context of 64 leaves room for 63 and an answer"
    ):
        greedy(llama(), [[1], [1] * CONTEXT], set())


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidData, match="prompt 1 holds no token"):
        greedy(llama(), [[]], set())


def test_latency_counts_from_the_start_of_the_batch_to_the_end_of_the_row() -> None:
    prompts = prompts_of_unequal_lengths()
    model = llama()
    answers = greedy(model, prompts, stops_that_occur(model, prompts), batch_size=16)
    by_end = sorted(answers, key=lambda answer: answer.seconds)
    steps = [len(answer.ids) + answer.stopped for answer in by_end]
    assert steps == sorted(steps)
    assert by_end[0].seconds > 0


def test_progress_counts_prompts_up_to_all_of_them() -> None:
    seen: list[tuple[int, int]] = []
    prompts = prompts_of_unequal_lengths()
    generate_greedy(
        llama(),
        prompts,
        max_new_tokens=2,
        stop_ids=set(),
        pad_id=0,
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_a_request_to_stop_is_obeyed_before_the_next_token() -> None:
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="stopped on request while answers were generated"):
        generate_greedy(
            llama(),
            [[1, 2]],
            max_new_tokens=20,
            stop_ids=set(),
            pad_id=0,
            batch_size=1,
            should_stop=lambda: next(asked),
        )


def test_a_streamed_answer_at_temperature_0_equals_the_greedy_one(model: LanguageModel) -> None:
    for prompt in prompts_of_unequal_lengths(3):
        streamed = list(stream_answer(model, prompt, max_new_tokens=24, stop_ids=set(), temperature=0, seed=0))
        assert streamed == reference_ids(model, prompt, 24, set())


def test_a_streamed_answer_ends_before_the_stop_token() -> None:
    model = llama()
    whole = list(stream_answer(model, [3, 4], max_new_tokens=24, stop_ids=set(), temperature=0, seed=0))
    stop = whole[5]
    cut = list(stream_answer(model, [3, 4], max_new_tokens=24, stop_ids={stop}, temperature=0, seed=0))
    assert cut == whole[: whole.index(stop)]


def test_drawn_tokens_depend_on_the_seed_alone() -> None:
    model = llama()

    def draw(seed: int) -> list[int]:
        return list(stream_answer(model, [3, 4], max_new_tokens=24, stop_ids=set(), temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_streaming_leaves_gradients_on_for_its_caller() -> None:
    for _ in stream_answer(llama(), [3, 4], max_new_tokens=2, stop_ids=set(), temperature=0, seed=0):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
