"""From a file of examples to ids and labels on disk, beside raw `encode_batch` and `datasets.map`, with the same ids.

python benchmarks/tokenization.py: JSON lines, one closing line per claim, exit 1 when short. `--tokenizer FOLDER` takes
another model's, `--tokens 1000000` a shorter run. Ours reads JSON Lines, renders, tokenises, labels and writes the
store; raw `tokenizers.Tokenizer.encode_batch` is given the rendered texts in memory and returns ids alone;
`datasets.map` reads the same file, renders and labels with the usual function, and writes Arrow. Runs alternate, on all
cores, each with a fresh tokenizer; the best setting of each peer is found first. Three corpora: rows of about 760 tokens
(a system prompt, a question, a long answer), of about 100, and rows whose answers have log-normal lengths like those of the
training benchmark (workload.py). No two rows are the same, but words are, as in any corpus: ours asks the tokenizer for each word once.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import Bar, close, emit
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data.examples import read_examples
from lorasmith.engine.data.rendering import render_text
from lorasmith.engine.data.tokenizing import tokenized
from lorasmith.engine.reporting import Reporter
from lorasmith.schemas.data import DataPreparationSpec, Example, Message
from lorasmith.services.data_curation import curate
from lorasmith.starter.location import starter_dataset, starter_model

NAME = "tokenization"
RAW_BAR, MAP_BAR = 0.95, 1.0
SEED = 7
SHAPES = ("mixed", "long", "short")
LONG_CHARACTERS = 1300  # of an answer, at least
MIXED_CHARACTERS = (math.log(350), 0.7)  # of an answer, at least: a median of 100 tokens, log-normal
RAW_BATCHES = (1024, 1 << 30)
MAP_SETTINGS = ((1, 1000), (2, 1000), (2, 250))  # processes, rows at once
IGNORED = -100


def write_corpus(path: Path, shape: str, tokens: int) -> None:
    """Conversations of one exchange from the built-in data, each with other texts."""
    source = curate(starter_dataset("interactions"), DataPreparationSpec()).parts["train"]
    if shape == "short":
        source = curate(starter_dataset("signatures"), DataPreparationSpec()).parts["train"]
    chance = random.Random(SEED)
    total = number = 0
    with path.open("w", encoding="utf-8") as file:
        while total < tokens:
            number += 1
            first = chance.choice(source)
            answer = first.answer()
            least = {"long": LONG_CHARACTERS, "mixed": chance.lognormvariate(*MIXED_CHARACTERS), "short": 0}[shape]
            while len(answer) < least:
                answer += "\n\n" + chance.choice(source).answer()
            system, question = first.prompt_messages()[:-1], first.prompt_messages()[-1].content
            messages = [  # no question or answer is there twice; system prompts are
                *system,
                Message(role="user", content=f"{question} ({number})"),
                Message(role="assistant", content=f"{answer} # {number}"),
            ]
            example = Example(id=f"{number:016x}", group=str(number), row=number, messages=messages)
            total += sum(len(message.content) for message in messages) // 3  # near enough
            file.write(example.model_dump_json(exclude_none=True) + "\n")


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]


def digest(ids: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()[:16]


def ours(path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[float, dict[str, Any]]:
    began = time.perf_counter()
    store = tokenized(path, folder / "tokens", tokenizer, stop_ids(tokenizer), Reporter(folder))
    seconds = time.perf_counter() - began
    trained = store.tokens >= 1 << 31
    ids = store.tokens & np.uint32((1 << 31) - 1)
    return seconds, {"tokens": len(ids), "ids": digest(ids), "labels": digest(ids[trained])}


def raw(path: Path, tokenizer: PreTrainedTokenizerBase, batch: int) -> tuple[float, dict[str, Any]]:
    texts = [render_text(tokenizer, example.messages or [], prompt=False) for example in read_examples(path)]
    rust = tokenizer.backend_tokenizer
    seconds, ids = 0.0, []
    for start in range(0, len(texts), batch):
        began = time.perf_counter()
        encodings = rust.encode_batch(texts[start : start + batch], add_special_tokens=False)
        seconds += time.perf_counter() - began
        ids += [token for encoding in encodings for token in encoding.ids]
    return seconds, {"tokens": len(ids), "ids": digest(np.array(ids))}


def mapped(
    path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, processes: int, batch: int
) -> tuple[float, dict[str, Any]]:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    stops = stop_ids(tokenizer)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        conversations = rows["messages"]
        before = tokenizer.apply_chat_template(
            [messages[:-1] for messages in conversations], tokenize=False, add_generation_prompt=True
        )
        after = tokenizer.apply_chat_template(conversations, tokenize=False)
        prompts = tokenizer(before, add_special_tokens=False)["input_ids"]
        answers = tokenizer(
            [text[len(prompt) :] for prompt, text in zip(before, after, strict=True)], add_special_tokens=False
        )["input_ids"]
        labels = []
        for prompt, answer in zip(prompts, answers, strict=True):
            stop = next(place for place, token in enumerate(answer) if token in stops) + 1
            labels.append([IGNORED] * len(prompt) + answer[:stop] + [IGNORED] * (len(answer) - stop))
        return {"input_ids": [p + a for p, a in zip(prompts, answers, strict=True)], "labels": labels}

    began = time.perf_counter()
    data = Dataset.from_json(str(path), cache_dir=str(folder))
    data = data.map(
        encode,
        batched=True,
        batch_size=batch,
        num_proc=processes if processes > 1 else None,
        remove_columns=data.column_names,
        cache_file_name=str(folder / "mapped.arrow"),
    )
    seconds = time.perf_counter() - began
    columns = data.with_format("arrow")[:]
    ids, labels = (columns[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels"))
    return seconds, {"tokens": len(ids), "ids": digest(ids), "labels": digest(labels[labels != IGNORED])}


def measured(who: str, shape: str, path: Path, model: Path) -> dict[str, Any]:
    """One run with a tokenizer that remembers nothing; wall time, and CPU seconds of this process and its children."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    kind, *numbers = who.split(":")
    # threads in two forked processes would fight over two cores, and those that were there before are not in a child
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if kind == "map" and numbers[0] != "1" else "true"
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        began = sum(os.times()[:4])
        if kind == "ours":
            seconds, facts = ours(path, tokenizer, folder)
        elif kind == "raw":
            seconds, facts = raw(path, tokenizer, int(numbers[0]))
        else:
            seconds, facts = mapped(path, tokenizer, folder, int(numbers[0]), int(numbers[1]))
        facts["cpu_seconds_with_checks"] = round(sum(os.times()[:4]) - began, 2)
    answer = {"seconds": round(seconds, 3), "tokens_per_s": round(facts["tokens"] / seconds), **facts}
    emit(NAME, who=who, shape=shape, **answer)
    return answer


def best(settings: list[str], shape: str, path: Path, model: Path) -> str:
    return max(settings, key=lambda who: measured(who, shape, path, model)["tokens_per_s"])


def compare(shape: str, path: Path, model: Path, alternations: int) -> list[Bar]:
    raw_best = best([f"raw:{batch}" for batch in RAW_BATCHES], shape, path, model)
    map_best = best([f"map:{processes}:{batch}" for processes, batch in MAP_SETTINGS], shape, path, model)
    runs = [
        {who: measured(who, shape, path, model) for who in ("ours", raw_best, map_best)} for _ in range(alternations)
    ]
    for run in runs:
        if len({found["ids"] for found in run.values()}) > 1 or run["ours"]["labels"] != run[map_best]["labels"]:
            raise SystemExit(f"{shape}: the ids or labels differ")
    speed = {who: statistics.median(run[who]["tokens_per_s"] for run in runs) for who in runs[0]}

    def bar(name: str, peer: str, least: float) -> Bar:
        ratio = statistics.median(run["ours"]["tokens_per_s"] / run[peer]["tokens_per_s"] for run in runs)
        words = f"{speed[peer]:,.0f} tokens/s ({peer})"
        return Bar(f"{NAME} {shape} {name}", f"{speed['ours']:,.0f} tokens/s", words, ratio, least)

    return [bar("encode_batch", raw_best, RAW_BAR), bar("datasets.map", map_best, MAP_BAR)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="about so many in each corpus")
    parser.add_argument("--alternations", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=starter_model(), help="model folder with a chat template")
    arguments = parser.parse_args()
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            path = Path(folder) / f"{shape}.jsonl"
            write_corpus(path, shape, arguments.tokens)
            bars += compare(shape, path, arguments.tokenizer, arguments.alternations)
    return close(bars)


if __name__ == "__main__":
    sys.exit(main())
