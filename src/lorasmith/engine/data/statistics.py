"""A job that counts the tokens of a dataset as a model is trained on them. It leaves the token stores for training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from lorasmith.engine.data.examples import has_conversations
from lorasmith.engine.data.labels import stop_ids
from lorasmith.engine.data.templates import choose_template
from lorasmith.engine.data.token_store import TokenStore, checks_of
from lorasmith.engine.data.tokenizing import tokenized
from lorasmith.engine.models.loading import load_tokenizer, model_folder
from lorasmith.engine.reporting import Reporter
from lorasmith.files import folder_size_bytes
from lorasmith.schemas.data import CheckName
from lorasmith.schemas.jobs import JobOrder
from lorasmith.schemas.statistics import Distribution, PartTokens, StatisticsInputs, StatisticsSpec, TokenStatistics


def run(order: JobOrder, folder: Path, report: Reporter) -> TokenStatistics:
    """Token counts of each part. The weights are not loaded. Raises `Interrupted` when asked to stop."""
    spec = StatisticsSpec.model_validate(order.spec)
    inputs = StatisticsInputs.model_validate(order.inputs)
    report("phase", name="tokenize")
    base_folder = model_folder(inputs.model_folder, weights=False)
    tokenizer = load_tokenizer(base_folder)
    files = {part: Path(path) for part, path in inputs.examples_files.items()}
    if spec.template is not None or any(has_conversations(path) for path in files.values()):
        choose_template(tokenizer, spec.template)
    config: Any = AutoConfig.from_pretrained(base_folder)
    context = getattr(config, "max_position_embeddings", None)
    limit = min(spec.max_seq_length, context or spec.max_seq_length)
    stops = stop_ids(base_folder, config, tokenizer)
    stores = {
        part: tokenized(path, Path(inputs.tokens_folder), tokenizer, stops, report) for part, path in files.items()
    }
    return TokenStatistics(
        model=inputs.model_name,
        max_tokens=limit,
        context=context,
        parts={part: part_tokens(store, limit) for part, store in stores.items()},
        store_bytes=sum(folder_size_bytes(store.folder) for store in stores.values()),
    )


def part_tokens(store: TokenStore, limit: int) -> PartTokens:
    above = np.maximum(store.lengths - limit, 0)
    failed: Counter[CheckName] = Counter()
    for packed, count in value_counts(store.failed).items():
        failed.update(dict.fromkeys(checks_of(packed), count))
    return PartTokens(
        tokens=Distribution.of(value_counts(store.lengths)),
        trained=Distribution.of(value_counts(store.trained)),
        over=int((above > 0).sum()),
        over_tokens=int(above.sum()),
        failed_checks=dict(failed),
    )


def value_counts(values: np.ndarray[Any, np.dtype[np.int64]]) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
