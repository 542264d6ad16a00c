"""`lorasmith test` and `lorasmith chat`"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import console_err, hint, print_json

if TYPE_CHECKING:
    from lorasmith.services.serving import Conversation

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token each time")]
System = Annotated[str | None, typer.Option(help="System message before the conversation")]


def test(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Adapter, or a base model with --base")],
    prompt: Annotated[str, typer.Argument(help="What to ask")],
    base: Annotated[bool, typer.Option("--base", help="The first argument names a base model")] = False,
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without the chat template")
    ] = False,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and timings as JSON")] = False,
) -> None:
    """Ask an adapter one thing and stream its answer"""
    values = {
        "adapter": None if base else adapter,
        "model": adapter if base else None,
        "prompt": prompt,
        "system": system,
        "raw": raw,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    conversation = open_conversation(context, values)
    result: dict[str, Any] = {}
    for reply in conversation.ask(first_turns(system, prompt)):
        result = reply.get("result", result)
        if not as_json:
            print(reply.get("text", ""), end="", flush=True)
    conversation.close()
    if as_json:
        print_json(result)
        return
    print()
    hint(facts(result))


def chat(
    context: typer.Context,
    adapter: Annotated[str | None, typer.Argument(help="Adapter to talk to")] = None,
    adapter_option: Annotated[str | None, typer.Option("--adapter", "-a", help="The same, as an option")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Talk to a base model")] = None,
    system: System = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampling")] = 0,
) -> None:
    """Talk to an adapter or a base model"""
    values = {
        "adapter": adapter or adapter_option,
        "model": model,
        "system": system,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    conversation = open_conversation(context, values)
    hint(f"{adapter or adapter_option or model} · /new starts over · Ctrl-D leaves")
    messages = first_turns(system)
    for line in user_lines():
        if line.strip() == "/new":
            messages = first_turns(system)
            continue
        messages.append({"role": "user", "content": line})
        result: dict[str, Any] = {}
        for reply in conversation.ask(messages):
            print(reply.get("text", ""), end="", flush=True)
            result = reply.get("result", result)
        print("\n")
        messages.append({"role": "assistant", "content": result["text"]})
        if not result["stopped"]:
            hint(f"cut after {result['generated_tokens']} tokens; --max-new-tokens allows more")
    conversation.close()


def open_conversation(context: typer.Context, values: dict[str, Any]) -> Conversation:
    from lorasmith.schemas.serving import GenerationSpec
    from lorasmith.services.serving import Conversation
    from lorasmith.services.specs import parse_spec

    return Conversation(open_workbench(context), parse_spec(GenerationSpec, values))


def first_turns(system: str | None, prompt: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}] if system else []
    return turns + ([{"role": "user", "content": prompt}] if prompt is not None else [])


def user_lines() -> Iterator[str]:
    """Lines that a person types, or that a pipe holds; empty ones are skipped."""
    while True:
        if sys.stdin.isatty():
            console_err().print("[bold cyan]you >[/bold cyan] ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def facts(result: dict[str, Any]) -> str:
    how = "stopped by itself" if result["stopped"] else "cut at the limit"
    rate = result["generated_tokens"] / result["seconds"] if result["seconds"] else 0
    return f"{result['generated_tokens']} tokens in {result['seconds']:.2f} s ({rate:,.0f}/s), {how}"
