"""What the fuzzing of each target begins with: the broken files of the tests and a few good ones."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator

from tests.services.broken_files import ARRAY, CHAT, CSV, GOOD, broken_files
from tools.fuzz.targets import KINDS

LARGEST = 20_000  # bytes; a longer seed slows every mutation of it
ROWS = (
    {"instruction": "a", "input": "b", "output": "c", "system": "d"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                       {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"}]},
    {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "a"},
                  {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]},
                  {"role": "tool", "tool_call_id": "x", "content": "1"}, {"role": "assistant", "content": "b", "weight": 0},
                  {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": []}}}]},
    {"text": "a", "label": "b"},
    {"text": "a", "summary": "b", "group": 1, "split": "val"},
    {"text": "caf\u00c3\u00a9 \u202e ann@mail.org password = 'abcdefgh1'"},
    {"task": {"description": "a"}, "agent": {"role": "coder"}, "execution": {"output": "b"}},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
     "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
    {"input": {"messages": [{"role": "user", "content": "a"}]}, "preferred_output": [{"role": "assistant", "content": "b"}],
     "non_preferred_output": [{"role": "assistant", "content": "c"}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}], "label": True},
)  # fmt: skip


def seeds_of(target: str) -> Iterator[bytes]:
    """Different ones; those of `conversion` and `import` begin with the byte that chooses format or kind of file."""
    yield from dict.fromkeys(seed for seed in all_seeds(target) if len(seed) <= LARGEST)


def all_seeds(target: str) -> Iterator[bytes]:
    files = dict(broken_files())
    rows = [json.dumps(row).encode() for row in ROWS]
    match target:
        case "json":
            yield from (ARRAY, *(content for name, content in files.items() if name.endswith(".json")))
            yield b"[" + b",\n".join(rows) + b"]"
        case "jsonl":
            yield from (GOOD + CHAT, *(content for name, content in files.items() if name.endswith(".jsonl")))
            yield b"\n".join(rows)
        case "csv":
            yield from (CSV, *(content for name, content in files.items() if name.endswith((".csv", ".tsv"))))
            yield CSV.replace(b",", b";")
        case "packed":
            yield from (content for name, content in files.items() if name.endswith((".gz", ".zst", ".parquet")))
            yield from (gzip.compress(GOOD), gzip.compress(CSV), *tables())
        case "conversion":
            yield from (bytes([number]) + row for number, row in enumerate(rows))
            yield b"\0[" + b",".join(rows) + b"]"
        case "import":
            for name, content in files.items():
                kind = next((kind for kind in KINDS if name.endswith(kind)), None)
                if kind is not None:
                    yield bytes([KINDS.index(kind)]) + content
            yield from (bytes([KINDS.index(".parquet")]) + table for table in tables())


def tables() -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    for rows in (
        [{"text": "a", "label": "b"}],
        [{"messages": [{"role": "user", "content": "a"}]}],
        [{"a": 1, "b": None}],
    ):
        table = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, compression="none")
        yield table.getvalue()
