"""Rows of the two starter datasets, and the chat turns mixed into the pretraining text.

`signatures` is what the demo learns: a function header in, its name, parameters and defaults out as JSON.
`interactions` has the collected-interactions shape: a documented signature in, the code out.
"""

from __future__ import annotations

import ast
import json
import random
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.starter.corpus import SourceFile

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

SIGNATURE_INSTRUCTION = "Describe this function header as JSON."
DOCSTRING_INSTRUCTION = "Write the docstring of this function."
COMPLETION_INSTRUCTION = "Continue this Python code."
REPEAT_INSTRUCTION = "Repeat this."


@dataclass(frozen=True)
class Function:
    module: str
    path: str
    header: str
    source: str
    node: FunctionNode


def functions(file: SourceFile) -> Iterator[Function]:
    """Every function of a file; `header` is its `def` line with white space collapsed, as written otherwise."""
    try:
        tree = ast.parse(file.text)
    except SyntaxError:
        return  # a dropped table left a hole
    lines = file.text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start, end = node.lineno - 1, node.end_lineno or node.lineno
            source = textwrap.dedent("\n".join(lines[start:end]))
            header = header_of(node, file.text)
            if header:
                yield Function(file.module, file.path, header, source, node)


def header_of(node: FunctionNode, text: str) -> str | None:
    """`def name(…) -> …:` on one line, or None where a comment stands between its lines."""
    lines = text.splitlines()
    segment = "\n".join(lines[node.lineno - 1 : node.body[0].lineno])
    segment = segment[node.col_offset :]
    for end in (match.end() for match in re.finditer(r":", segment)):
        candidate = segment[:end]
        try:
            parsed = ast.parse(textwrap.dedent(candidate) + " pass").body
        except SyntaxError:
            continue
        if len(parsed) == 1 and isinstance(parsed[0], ast.FunctionDef | ast.AsyncFunctionDef):
            if "#" in candidate or "\\\n" in candidate:
                return None
            collapsed = re.sub(r"([(\[]) | (?=[)\]])", r"\1", re.sub(r"\s+", " ", candidate))
            same = ast.dump(ast.parse(collapsed + " pass").body[0]) == ast.dump(parsed[0])
            return collapsed if same else None  # collapsing changed a default that is a string
    return None


def describe_header(header: str) -> dict[str, Any]:
    """Name, parameters in order (with `*` and `**`) and the source of each default, read by `ast`."""
    node = ast.parse(header + " pass").body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    parameters = [arg.arg for arg in positional]
    if args.vararg:
        parameters.append(f"*{args.vararg.arg}")
    parameters += [arg.arg for arg in args.kwonlyargs]
    if args.kwarg:
        parameters.append(f"**{args.kwarg.arg}")
    defaults: dict[str, str] = {}
    for arg, default in zip(positional[len(positional) - len(args.defaults) :], args.defaults, strict=True):
        defaults[arg.arg] = ast.get_source_segment(header + " pass", default) or ast.unparse(default)
    for arg, keyword_default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        if keyword_default is not None:
            segment = ast.get_source_segment(header + " pass", keyword_default)
            defaults[arg.arg] = segment or ast.unparse(keyword_default)
    return {"name": node.name, "parameters": parameters, "defaults": defaults}


def signature_row(function: Function) -> dict[str, Any] | None:
    """One `messages` row, or None for headers that are too long, not ASCII or have fewer than two parameters."""
    header = function.header
    if len(header) > 160 or not header.isascii():
        return None
    answer = describe_header(header)
    if len(answer["parameters"]) < 2:
        return None  # one parameter is too easy to copy to show anything
    return {
        "messages": [
            {"role": "user", "content": f"{SIGNATURE_INSTRUCTION}\n{header}"},
            {"role": "assistant", "content": json.dumps(answer)},
        ],
        "source": f"{function.path}:{answer['name']}",
        "group": function.module,
    }


def interaction_row(function: Function) -> dict[str, Any] | None:
    """One collected interaction, or None where the function has no docstring or is very short or long."""
    docstring = ast.get_docstring(function.node)
    if not docstring or not function.source.isascii():
        return None
    body = function.node.body[1:]
    if not body or not 2 <= len(function.source.splitlines()) <= 40 or len(function.source) > 1500:
        return None
    summary = docstring.split("\n\n")[0].strip()
    if not 15 <= len(summary) <= 400:
        return None
    code = without_docstring(function)
    if code is None:
        return None
    return {
        "task": {"description": f"Write this Python function.\n{function.header}\n{summary}"},
        "agent": {"role": "coder"},
        "execution": {"output": code},
        "source": f"{function.path}:{function.node.name}",
        "group": function.module,
    }


def without_docstring(function: Function) -> str | None:
    """The function's own source with its docstring cut out, or None if that would not parse."""
    offset = function.node.lineno
    first = function.node.body[0]
    lines = function.source.splitlines()
    code = "\n".join([*lines[: first.lineno - offset], *lines[(first.end_lineno or first.lineno) - offset + 1 :]])
    code = textwrap.dedent(code).strip("\n")
    try:
        ast.parse(code)
    except SyntaxError:
        return None
    return code


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def pretraining_chats(file: SourceFile, rng: random.Random) -> Iterator[str]:
    """Chat turns that teach the template and its stop token, in two forms that no starter dataset has."""
    for function in functions(file):
        docstring = ast.get_docstring(function.node)
        code = without_docstring(function) if docstring else None
        if docstring and code and len(code) < 1200 and len(docstring) < 600:
            yield chat(("user", f"{DOCSTRING_INSTRUCTION}\n{code}"), ("assistant", docstring.strip()))
        lines = function.source.splitlines()
        if 8 <= len(lines) <= 40 and len(function.source) < 1600 and rng.random() < 0.5:
            cut = rng.randrange(3, len(lines) - 2)
            user = f"{COMPLETION_INSTRUCTION}\n" + "\n".join(lines[:cut])
            yield chat(("user", user), ("assistant", "\n".join(lines[cut:])))
