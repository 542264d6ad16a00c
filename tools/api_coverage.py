"""Which endpoints of the workbench design are there: its list, held against the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

PREFIX = "/api/v1/finetune"
NOTICE = "<!-- Written by `make docs`; change the source instead. -->\n"
# Section of the design, then method, path below the prefix, and what it is for.
WANTED: dict[str, list[tuple[str, str, str]]] = {
    "7.1 Datasets": [
        ("POST", "/datasets", "upload a file as a dataset"),
        ("GET", "/datasets", "list datasets"),
        ("GET", "/datasets/{}", "show one"),
        ("DELETE", "/datasets/{}", "remove one"),
        ("PUT", "/datasets/{}", "change name and description"),
        ("GET", "/datasets/{}/preview", "look at examples"),
        ("GET", "/datasets/{}/statistics", "counts and lengths"),
        ("POST", "/datasets/{}/validate", "check the stored rows again"),
        ("POST", "/datasets/{}/split", "divide into parts again"),
        ("POST", "/datasets/convert", "write rows in another format"),
    ],
    "7.2 Distillation": [
        ("POST", "/distillation/jobs", "start a distillation"),
        ("GET", "/distillation/jobs", "list distillations"),
        ("GET", "/distillation/jobs/{}", "show one"),
        ("DELETE", "/distillation/jobs/{}", "cancel one"),
        ("GET", "/distillation/jobs/{}/preview", "look at generated rows"),
        ("POST", "/distillation/jobs/{}/approve", "make a dataset of them"),
        ("GET", "/distillation/templates", "list prompt templates"),
        ("POST", "/distillation/templates", "add a prompt template"),
    ],
    "7.3 Training": [
        ("POST", "/jobs", "start a training job"),
        ("GET", "/jobs", "list training jobs"),
        ("GET", "/jobs/{}", "show one"),
        ("DELETE", "/jobs/{}", "cancel one"),
        ("POST", "/jobs/{}/resume", "go on from the last checkpoint"),
        ("GET", "/jobs/{}/logs", "stream its log"),
        ("GET", "/jobs/{}/metrics", "its losses and speeds"),
        ("GET", "/jobs/{}/checkpoints", "list its checkpoints"),
        ("GET", "/presets", "list presets"),
        ("POST", "/presets", "add a preset"),
        ("GET", "/presets/{}", "show one"),
        ("POST", "/estimate", "memory, time and disk of a run"),
    ],
    "7.4 Adapters": [
        ("GET", "/adapters", "list adapters"),
        ("GET", "/adapters/{}", "show one"),
        ("DELETE", "/adapters/{}", "remove one"),
        ("POST", "/adapters/{}/merge", "merge with its base"),
        ("POST", "/adapters/{}/export", "write it for other programs"),
        ("POST", "/adapters/{}/deploy", "serve it"),
        ("GET", "/adapters/{}/compare", "compare it with its base"),
    ],
    "10.6 Evaluation": [
        ("POST", "/eval/compare", "start a comparison session"),
        ("GET", "/eval/compare", "list sessions"),
        ("GET", "/eval/compare/{}", "show one"),
        ("DELETE", "/eval/compare/{}", "remove one"),
        ("POST", "/eval/compare/{}/prompts", "add prompts"),
        ("POST", "/eval/compare/{}/run", "answer them"),
        ("POST", "/eval/compare/{}/rate", "rate answers"),
        ("GET", "/eval/compare/{}/export", "write the results"),
        ("POST", "/eval/benchmark", "start a benchmark"),
        ("GET", "/eval/benchmark", "list benchmarks"),
        ("GET", "/eval/benchmark/{}", "show one"),
        ("DELETE", "/eval/benchmark/{}", "cancel one"),
        ("GET", "/eval/benchmark/suites", "list what can be run"),
        ("POST", "/eval/benchmark/custom", "add one of your own"),
        ("POST", "/eval/judge", "let a model judge"),
        ("GET", "/eval/judge/{}", "show what it found"),
        ("GET", "/eval/judge/config", "how it judges"),
        ("POST", "/eval/performance", "measure speed"),
        ("GET", "/eval/performance/{}", "show what was measured"),
    ],
    "Beyond the design's list": [
        ("GET", "/models", "list base models"),
        ("POST", "/models", "add one"),
        ("GET", "/models/{}", "show one"),
        ("DELETE", "/models/{}", "remove one"),
        ("POST", "/jobs/{}/pause", "pause a training job"),
        ("POST", "/jobs/{}/clone", "start it again with changes"),
        ("POST", "/jobs/{}/checkpoint", "save a checkpoint now"),
    ],
}


def coverage_page(document: dict[str, Any]) -> str:
    there = set(operations(document))
    wanted = {(method, PREFIX + path) for section in WANTED.values() for method, path, _ in section}
    found = len(wanted & there)
    parts = [
        f"# What the REST API covers\n\n{NOTICE}",
        f"Of the {len(wanted)} endpoints below, all under `{PREFIX}`, {found} are there. An endpoint that is not there yet answers 404 "
        "and does not stand in [the OpenAPI document](openapi.json). `lorasmith serve` sends the document on "
        "`/api/v1/openapi.json`; [the guide](../guides/server.md) says how to call it.\n",
    ]
    for section, endpoints in WANTED.items():
        parts.append(f"## {section}\n\n| endpoint | what it does | there |\n| --- | --- | --- |")
        for method, path, purpose in endpoints:
            mark = "yes" if (method, PREFIX + path) in there else "not yet"
            parts.append(f"| `{method} {path.replace('{}', '{id}')}` | {purpose} | {mark} |")
        parts.append("")
    parts.append("## The others\n\n| endpoint | what it does |\n| --- | --- |")
    for (method, path), purpose in operations(document).items():
        if (method, path) not in wanted:
            parts.append(f"| `{method} {path.replace('{}', '{id}')}` | {purpose} |")
    return "\n".join(parts) + "\n"


def operations(document: dict[str, Any]) -> dict[tuple[str, str], str]:
    """(method, path with `{}` for each id) to what the operation's summary says."""
    return dict(each_operation(document))


def each_operation(document: dict[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            about = operation.get("description") or operation.get("summary", "")
            yield (method.upper(), re.sub(r"\{\w+\}", "{}", path)), about.splitlines()[0]
