"""lorasmith's training step, as a worker: settings and answer are described in protocol.py."""

from __future__ import annotations

import os
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import protocol
import torch
from peft import PeftConfig, PeftModel

from lorasmith.engine.__main__ import FEWER_KERNELS
from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.lora.quantized import AS_STORED
from lorasmith.engine.models.elementwise import can_compile
from lorasmith.engine.models.families import pack_weights
from lorasmith.engine.models.loading import load_model
from lorasmith.engine.models.precision import DTYPES, choose_precision, choose_weights
from lorasmith.engine.models.quantized_loading import half_bytes
from lorasmith.engine.models.workspace import retain_heap
from lorasmith.engine.training.computation import PackedComputation, checked_decoder

os.environ.update(FEWER_KERNELS)  # as an engine does


def main() -> None:
    settings, answers = protocol.begin()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    precision = choose_precision(settings["precision"])
    folder = Path(settings["model"])
    weights = choose_weights(settings["memory"], precision, half_bytes(folder))
    base = load_model(folder, DTYPES[precision], AS_STORED if weights == "stored" else None)
    config = PeftConfig.from_pretrained(settings["adapter"])
    config.lora_dropout = settings["dropout"]
    model = PeftModel.from_pretrained(base, settings["adapter"], config=config, is_trainable=True)
    decoder = checked_decoder(model, base.config.vocab_size, precision)
    if settings["memory"] == "fast":
        pack_weights(decoder, model)
    retain_heap()
    computation = PackedComputation(
        decoder,
        seed=settings["seed"],
        micro_batch_tokens=settings["micro_batch_tokens"],
        lean=settings["memory"] == "lean",
        recompute=settings["recompute"],
        compiled=settings["compiled"] and can_compile(),
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0, fused=True)
    rows = [
        RenderedExample(number, row["input_ids"], [bool(mask) for mask in row["completion_mask"]])
        for number, row in enumerate(protocol.read_rows(settings))
    ]
    load_seconds = protocol.load_seconds()
    size = settings["rows_per_step"]
    steps = [
        train_step(computation, optimizer, rows, list(range(size * number, size * (number + 1))), number)
        for number in settings["steps"]
    ]
    answer = {
        "library": "lorasmith",
        "versions": {name: version(name) for name in ("lorasmith", "torch", "transformers", "peft")},
        "resolved": {"threads": torch.get_num_threads(), "memory": settings["memory"], "weights": weights},
        "steps": steps,
        "load_seconds": load_seconds,
        "peak_bytes": protocol.peak_bytes(),
        "precision": precision,
        "paths": dict(Counter([*decoder.paths.values(), decoder.head.path])),
    }
    protocol.answer(answers, answer)


def train_step(
    computation: PackedComputation,
    optimizer: torch.optim.Optimizer,
    rows: list[RenderedExample],
    indices: list[int],
    step: int,
) -> dict[str, Any]:
    """One optimizer step over those rows, and what the protocol asks to know of it."""
    began, cpu_began = time.perf_counter(), time.process_time()
    labelled = sum(rows[index].trained_tokens for index in indices)
    nats = sum(
        computation.gradients(batch, rows, scale=1 / labelled, step=step)
        for batch in computation.micro_batches(indices, rows)
    )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(rows[index].ids) for index in indices)
    return {
        "rows": indices,
        "tokens": tokens,
        "labelled_tokens": labelled,
        "padded_tokens": tokens,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "loss": nats / labelled,
    }


if __name__ == "__main__":
    main()
