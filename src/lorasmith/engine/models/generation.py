"""Greedy answers for many prompts at once, and one answer token by token.

Prompts of near lengths share a batch, padded on the left; a row that has stopped leaves the batch, because a base
model that never learnt to stop would otherwise keep all others waiting.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lorasmith.engine.models.loading import context_tokens
from lorasmith.errors import Interrupted, InvalidData

LanguageModel = PreTrainedModel | PeftModel

COMPACT_SHARE = 0.25  # of a batch finished before it is compacted, which copies the cache of the rows that stay


@dataclass(frozen=True)
class Generated:
    """One answer: its ids without the stop token, whether it stopped by itself, seconds since its batch began."""

    ids: list[int]
    stopped: bool
    seconds: float


def generate_greedy(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    pad_id: int,
    batch_size: int,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """The most likely next token until a stop token, `max_new_tokens` or the end of the model's context.

    The answers are in the order of the prompts. `progress(done, total)` counts prompts and is called once per batch;
    `should_stop` is asked before each token and raises `Interrupted`. A prompt that leaves no room for an answer
    raises `InvalidData`.
    """
    rooms = [answer_room(model, prompt, max_new_tokens, f"prompt {index + 1}") for index, prompt in enumerate(prompts)]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Generated] = {}
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        generated = generate_batch(
            model, [prompts[i] for i in batch], [rooms[i] for i in batch], stop_ids, pad_id, should_stop
        )
        answers.update(zip(batch, generated, strict=True))
        if progress is not None:
            progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def answer_room(model: LanguageModel, prompt: Sequence[int], max_new_tokens: int, name: str) -> int:
    """How many tokens may follow the prompt. Raises `InvalidData` when it is empty or fills the model's context."""
    if not prompt:
        raise InvalidData(f"{name} holds no token")
    context = context_tokens(unwrapped(model))
    if context is None:
        return max_new_tokens
    if len(prompt) >= context:
        raise InvalidData(
            f"{name} has {len(prompt)} tokens; the model's context of {context} leaves room for {context - 1} and an answer",
            hint="shorten the prompt, or choose a model with a longer context",
        )
    return min(max_new_tokens, context - len(prompt))


def unwrapped(model: LanguageModel) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


@torch.inference_mode()
def generate_batch(
    model: LanguageModel,
    prompts: list[list[int]],
    rooms: list[int],
    stop_ids: set[int],
    pad_id: int,
    should_stop: Callable[[], bool] | None,
) -> list[Generated]:
    """Answers of one batch; row i ends after at most `rooms[i]` tokens."""
    started = time.perf_counter()
    state = Decoding(model, prompts, pad_id, max(rooms))
    rows = list(range(len(prompts)))  # batch position -> prompt; finished rows stay until the next compaction
    ids: list[list[int]] = [[] for _ in prompts]
    ended: dict[int, Generated] = {}
    while True:
        if should_stop is not None and should_stop():
            raise Interrupted("stopped on request while answers were generated")
        next_ids = state.logits.argmax(-1)  # (rows,)
        for row, token in zip(rows, next_ids.tolist(), strict=True):
            if row in ended:
                continue
            stopped = token in stop_ids
            if not stopped:
                ids[row].append(token)
            if stopped or len(ids[row]) == rooms[row]:
                ended[row] = Generated(ids[row], stopped, time.perf_counter() - started)
        staying = [position for position, row in enumerate(rows) if row not in ended]
        if not staying:
            return [ended[row] for row in range(len(prompts))]
        if len(rows) - len(staying) >= COMPACT_SHARE * len(rows):
            keep = torch.tensor(staying, device=next_ids.device)
            state.keep(keep)
            next_ids = next_ids[keep]
            rows = [rows[position] for position in staying]
        state.feed(next_ids)


class Decoding:
    """The cache of a batch and the logits (rows, vocabulary) of each row's next token."""

    def __init__(self, model: LanguageModel, prompts: list[list[int]], pad_id: int, max_new_tokens: int) -> None:
        base = unwrapped(model)
        device = base.device
        accepted = inspect.signature(base.forward).parameters
        self.model = model
        self.cache = cache_with_room(base, max(len(prompt) for prompt in prompts) + max_new_tokens)
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.width = max(len(prompt) for prompt in prompts)
        self.padded = any(len(prompt) != self.width for prompt in prompts)  # an unpadded batch takes the faster kernel
        self.positioned = self.padded and "position_ids" in accepted
        ids = torch.tensor(
            [[pad_id] * (self.width - len(prompt)) + prompt for prompt in prompts], device=device
        )  # (B, T)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
        columns = torch.arange(self.width + max_new_tokens, device=device)
        self.mask = (columns >= self.width - self.lengths[:, None]).long()  # (B, T + new), zero on padding
        positions = (columns[: self.width] - (self.width - self.lengths[:, None])).clamp(min=0)  # (B, T)
        self.logits = self.forward(ids, positions)

    def feed(self, next_ids: Tensor) -> None:
        """Append one token (rows,) to each row."""
        positions = self.lengths[:, None]  # (rows, 1)
        self.lengths = self.lengths + 1
        self.width += 1
        self.logits = self.forward(next_ids[:, None], positions)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these from the batch."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # any tensor of indices does
        self.lengths, self.mask = self.lengths[rows], self.mask[rows]

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        inputs: dict[str, Tensor] = {}
        if self.padded:
            inputs["attention_mask"] = self.mask[:, : self.width]
        if self.positioned:
            inputs["position_ids"] = positions
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **inputs, **self.last_only)
        logits: Tensor = output.logits[:, -1]
        return logits


def cache_with_room(model: PreTrainedModel, capacity: int) -> Cache:
    """The model's own kind of cache; its full-attention layers have room for `capacity` tokens from the start."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values (B, heads, T, head_dim) as views into larger tensors: a step writes one column.

    The layer it replaces copies all earlier tokens at each step, more than half of the time of a small model.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.all_keys, self.all_values = self.room_like(key_states), self.room_like(value_states)
        end = self.length + key_states.shape[-2]
        self.all_keys[:, :, self.length : end] = key_states
        self.all_values[:, :, self.length : end] = value_states
        return self.show(end)

    def room_like(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:2], self.capacity, states.shape[3])  # (B, heads, capacity, head_dim)

    def show(self, length: int) -> tuple[Tensor, Tensor]:
        self.length = length
        keys, values = self.all_keys[:, :, :length], self.all_values[:, :, :length]
        self.keys, self.values = keys, values
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows (kept,) of the batch."""
        self.all_keys, self.all_values = self.all_keys[beam_idx], self.all_values[beam_idx]
        self.show(self.length)


def stream_answer(
    model: LanguageModel,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens of one answer as they are made, without the stop token.

    Temperature 0 takes the most likely token; above it tokens are drawn, the same ones for the same seed.
    """
    room = answer_room(model, prompt_ids, max_new_tokens, "the prompt")
    draws = torch.Generator().manual_seed(seed)
    state: Decoding | None = None
    token = -1
    for _ in range(room):
        with torch.inference_mode():  # not around the yield, where it would reach into the caller
            if state is None:
                state = Decoding(model, [prompt_ids], 0, room)
            else:
                state.feed(torch.tensor([token], device=state.logits.device))
            token = choose_token(state.logits[0], temperature, draws)
        if token in stop_ids:
            return
        yield token


def choose_token(logits: Tensor, temperature: float, draws: torch.Generator) -> int:
    """The most likely token of (vocabulary,) logits, or one drawn at the temperature."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=draws))
