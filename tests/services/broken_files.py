"""Files that are wrong in every way that could be thought of, and a few that are only odd: made here, in code."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

GOOD = b'{"input": "Where is it?", "output": "In the hall."}\n'
ARRAY = b'[{"input": "Where is it?", "output": "In the hall."},\n{"input": "Who?", "output": "Ann."}]'
CSV = b'input,output\nWhere is it?,In the hall.\n"Who, then?","Ann, ""the"" cook"\n'
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
BOMS = {"utf8": b"\xef\xbb\xbf", "utf16le": b"\xff\xfe", "utf16be": b"\xfe\xff", "utf32": b"\xff\xfe\0\0"}
EXTENSIONS = ("json", "jsonl", "csv", "tsv")


def broken_files() -> Iterator[tuple[str, bytes]]:
    """(name with extension, content); the names are unique."""
    yield from odd_bytes()
    yield from cut_files()
    yield from packed_files()
    yield from odd_documents()
    yield from odd_lines()
    yield from odd_tables()
    yield from odd_conversations()


def odd_bytes() -> Iterator[tuple[str, bytes]]:
    """In files of each extension."""
    contents = {
        "empty": b"",
        "blanks": b" \n\r\n\t \n" * 50,
        "nul": b"\0" * 1000,
        "random": bytes(range(256)) * 20,
        "one-byte": b"\xff",
        "brace": b"{",
        "bracket": b"[",
        "quote": b'"',
        "comma": b",",
        "long-line": b"x" * 300_000,
        "elf": b"\x7fELF\x02\x01\x01" + b"\0" * 100,
        "html": b"<!DOCTYPE html>\n<html><body>Not Found</body></html>\n",
        "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "yaml": b"- input: a\n  output: b\n",
        "bidi": "\u202e\u2066 evil\n".encode(),
    }
    for extension in EXTENSIONS:
        for name, content in contents.items():
            yield f"{name}.{extension}", content
    for name, mark in BOMS.items():
        yield f"bom-alone-{name}.jsonl", mark
        yield f"bom-good-{name}.jsonl", mark + GOOD
        yield f"bom-csv-{name}.csv", mark + CSV
        yield f"bom-array-{name}.json", mark + ARRAY
    for encoding in ("utf-16", "utf-32", "shift_jis", "cp1251", "utf-7"):
        text = "input,output\nПривет,да\n" if encoding != "shift_jis" else "input,output\nこんにちは,はい\n"
        yield f"csv-in-{encoding}.csv", text.encode(encoding)
        yield f"json-in-{encoding}.json", json.dumps([{"input": "ä", "output": "ö"}]).encode(encoding)


def cut_files() -> Iterator[tuple[str, bytes]]:
    for length in (1, 2, 9, 20, 33, 50, 60):
        yield f"array-cut-at-{length}.json", ARRAY[:length]
        yield f"line-cut-at-{length}.jsonl", (GOOD + CHAT)[:length]
        yield f"csv-cut-at-{length}.csv", CSV[:length]


def packed_files() -> Iterator[tuple[str, bytes]]:
    packed = gzip.compress(GOOD * 50)
    yield "cut.jsonl.gz", packed[:-9]
    yield "head-alone.jsonl.gz", packed[:10]
    yield "garbage-behind.jsonl.gz", packed + b"garbage"
    yield "wrong-checksum.jsonl.gz", packed[:-8] + b"\0" * 8
    yield "no-gzip.jsonl.gz", GOOD
    yield "empty.jsonl.gz", b""
    yield "twice-packed.jsonl.gz", gzip.compress(packed)
    yield "bomb-of-zeros.jsonl.gz", gzip.compress(b"\0" * 80_000_000, 6)
    yield "bomb-of-lines.jsonl.gz", gzip.compress(b"\n" * 60_000_000, 6)
    yield "bomb-of-csv.csv.gz", gzip.compress(b"text\n" + b"a" * 60_000_000, 6)
    yield "bomb-of-brackets.json.gz", gzip.compress(b"[" * 60_000_000, 6)
    yield "no-zstd.jsonl.zst", GOOD
    yield "no-parquet.parquet", b"PAR1"
    yield "parquet-of-text.parquet", GOOD * 10
    yield "parquet-marks.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"


def odd_documents() -> Iterator[tuple[str, bytes]]:
    contents = {
        "deep": b"[" * 10_000 + b"]" * 10_000,
        "deep-row": b'[{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}]",
        "deep-objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        "number": b"12",
        "text": b'"hello"',
        "null": b"null",
        "empty-list": b"[]",
        "empty-object": b"{}",
        "empty-row": b"[{}]",
        "list-of-lists": b"[[1], [2]]",
        "list-of-null": b"[null, null]",
        "missing-comma": b'[{"text": "a"} {"text": "b"}]',
        "trailing-comma": b'[{"text": "a"},]',
        "trailing-garbage": ARRAY + b" x",
        "two-documents": ARRAY + ARRAY,
        "single-quotes": b"[{'text': 'a'}]",
        "comment": b'// rows\n[{"text": "a"}]',
        "key-twice": b'[{"text": "a", "text": "b"}]',
        "key-twice-in-document": b'{"rows": [{"text": "a"}], "rows": []}',
        "two-lists": b'{"a": [{"text": "a"}], "b": [{"text": "b"}]}',
        "nan": b'[{"text": NaN}]',
        "infinity": b'[{"text": "a", "score": -Infinity}]',
        "huge-number": b'[{"text": ' + b"9" * 6000 + b"}]",
        "huge-exponent": b'[{"text": 1e999999}]',
        "half-surrogate": b'[{"text": "\\ud800"}]',
        "half-surrogate-key": b'[{"\\udfff": "a"}]',
        "bad-escape": b'[{"text": "\\x"}]',
        "cut-escape": b'[{"text": "\\u12',
        "control-in-text": b'[{"text": "a\nb"}]',
        "unclosed-text": b'[{"text": "a',
        "wrapped-cut": b'{"rows": [{"text": "a"}',
        "wrapped-no-colon": b'{"rows" [{"text": "a"}]}',
        "many-columns": json.dumps([{f"c{n}": n for n in range(5000)}]).encode(),
        "no-utf8-in-text": b'[{"text": "caf\xe9"}]',
        "no-utf8-cut": b'[{"text": "caf\xc3',
    }
    for name, content in contents.items():
        yield f"document-{name}.json", content


def odd_lines() -> Iterator[tuple[str, bytes]]:
    contents = {
        "first-broken": b"{broken\n" + GOOD * 5,
        "last-broken": GOOD * 5 + b"{broken",
        "middle-broken": GOOD * 5 + b"\xff\xfe\n" + GOOD,
        "deep": GOOD + b'{"input": ' + b"[" * 10_000 + b"\n",
        "pretty-printed": json.dumps({"input": "a", "output": "b"}, indent=2).encode(),
        "list": b"[1, 2]\n[3]\n",
        "numbers": b"1\n2\n",
        "key-twice": b'{"text": "a", "text": "b"}\n',
        "nan": b'{"text": NaN}\n',
        "only-group": b'{"group": "a"}\n',
        "bad-split": b'{"text": "a", "split": "dev"}\n',
        "split-without-train": b'{"text": "a", "split": "test"}\n',
        "bad-group": b'{"text": "a", "group": {"b": 1}}\n',
        "nothing-in-it": b'{"text": ""}\n{"text": null}\n{"text": " "}\n',
        "carriage-returns": GOOD.replace(b"\n", b"\r") * 3,
        "bidi-names": '{"\u202etxet": "a"}\n'.encode(),
        "unknown-columns": b'{"foo": "a", "bar": "b"}\n',
    }
    for name, content in contents.items():
        yield f"lines-{name}.jsonl", content


def odd_tables() -> Iterator[tuple[str, bytes]]:
    contents = {
        "stray-quote": b'input,output\na,"b\nc,d\n',
        "quote-inside": b'input,output\na,b"c\n',
        "quote-behind": b'input,output\n"a"b,c\n',
        "too-many-columns": b"input,output\na,b,c\n",
        "too-few-columns": b"input,output\na\n",
        "header-alone": b"input,output\n",
        "header-twice": b"text,text\na,b\n",
        "no-header-names": b",,,\n1,2,3,4\n",
        "nul-inside": b"input,output\na\0b,c\n",
        "separators-mixed": b"input;output\na,b\nc;d\n",
        "stated-separator": b"sep=;\n",
        "quoted-forever": b'text,label\n"' + b"a\n" * 200_000,
        "formulas": b"input,output\n=cmd|' /C calc'!A0,b\n",
        "unknown-columns": b"foo,bar\na,b\n",
        "latin": "text,label\ncaf\xe9,x\n".encode("latin-1") + b"\x81\n",
    }
    for name, content in contents.items():
        yield f"table-{name}.csv", content


def odd_conversations() -> Iterator[tuple[str, bytes]]:
    rows: dict[str, object] = {
        "empty": {"messages": []},
        "null": {"messages": None},
        "text": {"messages": "hi"},
        "of-texts": {"messages": ["hi", "there"]},
        "no-role": {"messages": [{"content": "a"}]},
        "no-answer": {"messages": [{"role": "user", "content": "a"}]},
        "system-alone": {"messages": [{"role": "system", "content": "a"}]},
        "answer-first": {"messages": [{"role": "assistant", "content": "a"}]},
        "twice-the-user": {"messages": [{"role": "user", "content": "a"}] * 2},
        "parts": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "number": {"messages": [{"role": "user", "content": 1}]},
        "role-of-lists": {"messages": [{"role": ["user"], "content": "a"}]},
        "weight": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]},
        "calls-text": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": "x"}]},
        "calls-null": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [None]}]},
        "call-arguments": {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            ]
        },
        "tools": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": 5},
        "conversations": {"conversations": [{"from": "human"}, {"value": "a"}, 7]},
        "chosen-alone": {"prompt": "a", "chosen": "b"},
        "chosen-equal": {"prompt": "a", "chosen": "b", "rejected": "b"},
        "chosen-null": {"chosen": None, "rejected": None},
        "chosen-empty": {"prompt": [], "chosen": [], "rejected": []},
        "preferred": {"input": 1, "preferred_output": [], "non_preferred_output": []},
        "kto": {"prompt": "a", "completion": [], "label": True},
        "interactions": {"task": {}, "execution": []},
    }
    for name, row in rows.items():
        yield f"conversation-{name}.jsonl", json.dumps(row).encode() + b"\n"
