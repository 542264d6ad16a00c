"""Memory that runs out in the middle of a run: an address space that is really too small, and a process really killed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from lorasmith.engine.data.rendering import render_example
from lorasmith.engine.models.families import read_decoder
from lorasmith.engine.out_of_memory import ran_out_of_memory
from lorasmith.engine.training.computation import PackedComputation
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.memory import summed
from lorasmith.errors import JobFailed
from lorasmith.schemas.data import Example, Message
from tests.engine.decoder_cases import adapted, random_rows, tiny_base
from tests.engine.small_jobs import events, run_engine, write_examples
from tests.engine.small_memory import SmallMemory

Job = Callable[..., Path]

ENGINE = """
import re, sys
from pathlib import Path
from lorasmith.engine.__main__ import main
for folder in sys.argv[1:]:
    status = main([folder])
    print(status, re.search(r"VmPeak:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Much memory per token and few weights: an MLP 200 times as wide as the stream."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("wide")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def equal_rows(count: int, words: int) -> list[Example]:
    """Rows of one length."""
    return [
        Example(
            id=f"{index:016x}",
            group=str(index),
            row=index + 1,
            messages=[Message(role="user", content="Say it."), Message(role="assistant", content="word " * words)],
        )
        for index in range(count)
    ]


def run_limited(*folders: Path, limit_bytes: int | None = None) -> list[int]:
    """Largest address space of an engine process, with at most `limit_bytes` of it, after each of those jobs."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    ran = subprocess.run(
        [sys.executable, "-c", ENGINE, *map(str, folders)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    ended = [tuple(map(int, line.split())) for line in ran.stdout.splitlines()]
    assert [status for status, _ in ended] == [0] * len(folders), ran.stderr
    return [kilobytes * 1024 for _, kilobytes in ended]


def assert_same_adapter(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


PACKED = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": "mlp"}
PEFT = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "mlp", "use_dora": True}


@pytest.mark.slow  # three quarters of a minute and more; the update of a split step is quick to test
@pytest.mark.parametrize(
    ("lora", "unit"), [pytest.param(PACKED, "tokens", id="packed"), pytest.param(PEFT, "rows", id="peft")]
)
def test_a_step_that_does_not_fit_is_split_and_the_run_ends_as_one_split_from_the_start(
    wide_folder: Path,
    training_job: Job,
    tokenizer: PreTrainedTokenizerBase,
    lora: dict[str, Any],
    unit: str,
) -> None:
    examples = equal_rows(8, 60)
    length = len(render_example(tokenizer, examples[0], {int(tokenizer.eos_token_id)}).ids)  # type: ignore[arg-type]

    def job(name: str, rows_at_once: int) -> Path:
        tokens = {"batch_size": 8, "micro_batch_tokens": length * rows_at_once}
        rows = {"batch_size": rows_at_once, "gradient_accumulation_steps": 8 // rows_at_once}
        settings = tokens if unit == "tokens" else rows
        folder = training_job(wide_folder, name, lora=lora, max_steps=2, max_seq_length=512, **settings)
        write_examples(folder.parent / "train.jsonl", examples)
        write_examples(folder.parent / "val.jsonl", equal_rows(1, 5))
        return folder

    alone, split, whole, short = job("alone", 1), job("split", 4), job("whole", 8), job("short", 8)
    least, _, needed = run_limited(alone, split, whole)
    run_limited(short, limit_bytes=(least + needed) // 2)
    one = length if unit == "tokens" else 1
    smaller = json.loads((short / "machine.json").read_text(encoding="utf-8"))["micro_batch"]
    texts = [event["text"] for event in events(short, "warning")]
    first = f"step 1 does not fit into memory: {4 * one} {unit} at once from now on instead of {8 * one}, for the same update"
    assert texts == [first]
    assert smaller == 4 * one
    assert_same_adapter(short, split)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_update_of_a_split_step_is_that_of_the_whole_one(dropout: float) -> None:
    rows = random_rows([9 + 3 * (index % 7) for index in range(16)])
    updates, sizes = [], []
    for room in (1000, 100, 40):
        model = adapted(tiny_base("qwen3", dtype=torch.float64), dropout=dropout).double()
        computation = PackedComputation(read_decoder(model), seed=0, micro_batch_tokens=1000)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        small = SmallMemory(computation, room)
        summed(
            small,  # type: ignore[arg-type]
            Devices(),
            range(16),
            rows,
            lambda batch, small=small: small.gradients(batch, rows, scale=1e-3, step=0),  # type: ignore[misc]
            lambda before, after, optimizer=optimizer: optimizer.zero_grad(set_to_none=True),  # type: ignore[misc]
            trained=True,
        )
        optimizer.step()
        sizes.append(computation.at_once)
        updates.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert sizes[0] == 1000
    assert sizes[2] < sizes[1] <= 100
    for split in updates[1:]:
        for name, whole in updates[0].items():
            torch.testing.assert_close(split[name], whole, atol=1e-10, rtol=0)  # float64


def test_a_row_that_does_not_fit_alone_is_named_with_the_ways_out() -> None:
    rows = random_rows([12, 50, 14, 13])
    computation = PackedComputation(read_decoder(adapted(tiny_base("llama"))), seed=0, micro_batch_tokens=1000)
    small, changes = SmallMemory(computation, 40), []
    with pytest.raises(JobFailed, match="row 2 with 50 tokens does not fit into memory, though") as failure:
        summed(
            small,  # type: ignore[arg-type]
            Devices(),
            range(4),
            rows,
            lambda batch: small.gradients(batch, rows, scale=1e-3, step=0),
            lambda *change: changes.append(change),
            trained=True,
        )
    assert failure.value.code == "oom"
    assert "training.gradient_checkpointing=true" in str(failure.value.hint)
    assert changes == [(1000, 44)]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises((MemoryError, RuntimeError)) as failure:
        torch.empty(1 << 55)
    assert ran_out_of_memory(failure.value)


@pytest.mark.parametrize("what", ["create a memory", "create a primitive", "execute a primitive"])
def test_what_onednn_says_of_whatever_it_has_no_memory_for_is_a_lack_of_memory(what: str) -> None:
    """An engine in bf16 under `ulimit -v` 1,050,000 ends so."""
    assert ran_out_of_memory(RuntimeError(f"could not {what}"))


def test_an_adapter_is_written_where_there_is_no_memory_for_its_plot(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("lorasmith.engine.training.artifacts.plot_loss", no_memory)
    folder = training_job(qwen2_folder, max_steps=2)
    run_engine(folder)
    assert "loss.png is left out: the machine ran out of memory" in [e["text"] for e in events(folder, "warning")]
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert "loss.png" not in (folder / "adapter" / "README.md").read_text(encoding="utf-8")
