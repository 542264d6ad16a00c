"""A conversation over standard input and output: one JSON line per turn in, pieces of the answer out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import encode, prompt_ids
from lorasmith.engine.models.generation import stream_answer
from lorasmith.engine.models.loading import (
    check_base,
    context_tokens,
    eos_token_ids,
    load_adapter,
    load_tokenizer,
    load_within_memory,
    model_folder,
)
from lorasmith.engine.models.precision import native_precision
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.data import Message
from lorasmith.schemas.jobs import JobOrder
from lorasmith.schemas.serving import GenerationInputs, GenerationResult, GenerationSpec


def run(order: JobOrder, folder: Path, report: Reporter) -> GenerationResult:
    """Answer turns until standard input ends; returns the last answer."""
    spec = GenerationSpec.model_validate(order.spec)
    inputs = GenerationInputs.model_validate(order.inputs)
    base_folder = model_folder(inputs.model_folder)
    adapter = Path(inputs.adapter_folder) if inputs.adapter_folder else None
    if adapter is not None:
        check_base(adapter, base_folder)
    own_tokenizer = adapter is not None and (adapter / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(adapter if adapter and own_tokenizer else base_folder)
    model: Any = load_within_memory(base_folder, native_precision())
    stop_ids = eos_token_ids(model, tokenizer)
    context = context_tokens(model)
    if adapter is not None:
        model = load_adapter(model, adapter)
    torch.manual_seed(spec.seed)
    last = GenerationResult(text="", stopped=False, prompt_tokens=0, generated_tokens=0, seconds=0.0)
    for line in sys.stdin:
        messages = [Message.model_validate(message) for message in json.loads(line)["messages"]]
        ids = turn_ids(tokenizer, messages, raw=spec.raw)
        room = (context or len(ids) + spec.max_new_tokens) - len(ids)
        if room < 1:
            raise InvalidSpec(
                f"the conversation has {len(ids)} tokens and the model's context is {context}",
                hint="start a new conversation with /new",
            )
        last = answer(model, tokenizer, ids, spec, stop_ids, min(spec.max_new_tokens, room))
        reply({"result": last.model_dump()})
        if report.stop_requested:
            break
    return last


def turn_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, raw: bool) -> list[int]:
    if raw:
        return encode(tokenizer, messages[-1].content)
    if tokenizer.chat_template is None:
        raise InvalidSpec("this model has no chat template", hint="use --raw to continue the prompt as plain text")
    return prompt_ids(tokenizer, messages)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int], spec: GenerationSpec, stop_ids: set[int], room: int
) -> GenerationResult:
    """Stream one answer. A piece is sent when its bytes make whole characters."""
    began = time.perf_counter()
    generated: list[int] = []
    sent = ""
    for token in stream_answer(
        model, ids, max_new_tokens=room, stop_ids=stop_ids, temperature=spec.temperature, seed=spec.seed
    ):
        generated.append(token)
        text = str(tokenizer.decode(generated, skip_special_tokens=True))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            reply({"text": text[len(sent) :]})
            sent = text
    return GenerationResult(
        text=str(tokenizer.decode(generated, skip_special_tokens=True)),
        stopped=len(generated) < room,
        prompt_tokens=len(ids),
        generated_tokens=len(generated),
        seconds=time.perf_counter() - began,
    )


def reply(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)
