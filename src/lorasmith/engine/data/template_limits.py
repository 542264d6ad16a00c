"""Bounds for chat templates, which come with models and are programs: the sandbox of jinja2 bounds what they reach, not how long.

Python is stopped between two of its steps. What takes long within one step is bounded by memory (texts, lists), or refused before:
powers, and `round`, which computes one.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorasmith.errors import InvalidModel
from lorasmith.schemas.data import Message

SECONDS = 10.0  # of the thread's own time, for a call; a whole chunk of rows takes well under one
SECONDS_EACH = 0.05  # for each conversation; one takes 0.1 ms
MEMORY_BYTES = 2 * 1024**3  # beyond what the process has mapped
LONGEST_TEXT = 4_000_000  # characters of a conversation; more where its messages have so many themselves
CHECK_EVERY_S = 0.25
WAY_OUT = "the template comes with the model; another one is chosen with --template chatml or --template plain"


class TookTooLong(Exception):
    """Raised in the thread that renders, between two of its steps."""


class Generation(Extension):
    """Parses the tag that transformers adds; what is inside is looked at like the rest."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def check_template(template: str) -> None:
    """Raise `InvalidModel` for a template that is none, or that computes powers, which no limit can stop."""
    environment = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols])
    try:
        tree = environment.parse(template)
    except (TemplateSyntaxError, RecursionError) as error:
        raise InvalidModel(f"the chat template is not one of jinja2: {error}", hint=WAY_OUT) from error
    power = next(tree.find_all(nodes.Pow), None)
    rounds = [node for node in tree.find_all(nodes.Filter) if node.name == "round" or maps_round(node)]
    for node in [power, *rounds]:
        if node is not None:
            raise InvalidModel(f"the chat template computes powers, in line {node.lineno}", hint=WAY_OUT)


def maps_round(node: nodes.Filter) -> bool:
    """`|map('round', …)`, or a map whose filter is computed."""
    if node.name != "map" or not node.args:
        return False
    name = node.args[0]
    return not isinstance(name, nodes.Const) or name.value == "round"


def check_lengths(texts: Sequence[str], conversations: Sequence[Sequence[Message]], tools: Any) -> None:
    """Raise `InvalidModel` where a text is out of all proportion to its conversation."""
    for text, messages in zip(texts, conversations, strict=True):
        if len(text) > LONGEST_TEXT and len(text) > 10 * len(
            json.dumps([[message.for_template() for message in messages], tools])
        ):
            raise InvalidModel(f"the chat template makes {len(text):,} characters of one conversation", hint=WAY_OUT)


@contextmanager
def limits(conversations: int) -> Iterator[None]:
    """Let a template render so many conversations. Raises `InvalidModel` where it fails, takes too long or too much memory."""
    seconds = SECONDS + SECONDS_EACH * conversations
    try:
        with time_limit(seconds), memory_limit(MEMORY_BYTES):
            yield
    except TookTooLong:
        what = f"takes more than {seconds:.0f} s for {conversations} conversations"
    except MemoryError:
        what = f"takes more than {MEMORY_BYTES / 1024**3:.0f} GiB of memory"
    except RecursionError:
        what = "takes more calls within calls than Python allows"
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # what it raises, or its code
        raise InvalidModel(f"the chat template does not take a conversation: {error}", hint=WAY_OUT) from error
    else:
        return
    raise InvalidModel(f"the chat template {what}", hint=WAY_OUT)


class Watchdog:
    """A thread that looks how long others have computed; it sleeps where none is limited, as starting one for each call costs 0.2 ms."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.ends: dict[int, tuple[int, float]] = {}  # by thread: its clock, and what it must not reach
        self.lock = threading.Lock()
        self.needed = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self, thread: int, clock: int, end: float) -> None:
        with self.lock:
            self.ends[thread] = (clock, end)
            if self.thread is None or not self.thread.is_alive():  # the first time, and in a process that was forked
                self.thread = threading.Thread(target=self.run, name="template limits", daemon=True)
                self.thread.start()
        self.needed.set()

    def end(self, thread: int) -> None:
        """Afterwards nothing more is raised in it."""
        with self.lock:
            self.ends.pop(thread, None)

    def run(self) -> None:
        while self.needed.wait():
            time.sleep(CHECK_EVERY_S)
            with self.lock:
                for thread, (clock, end) in self.ends.items():
                    if time.clock_gettime(clock) > end:
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(TookTooLong)
                        )
                if not self.ends:
                    self.needed.clear()


WATCHDOG = Watchdog()
os.register_at_fork(after_in_child=WATCHDOG.reset)  # which has neither the thread nor whoever held the lock


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in this thread, once it has computed for so long; a busy machine takes nothing of it."""
    thread = threading.get_ident()
    clock = time.pthread_getcpuclockid(thread)
    WATCHDOG.begin(thread, clock, time.clock_gettime(clock) + seconds)
    try:
        yield
    finally:
        WATCHDOG.end(thread)


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Nothing in this process maps so much more meanwhile: `MemoryError` instead."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    wanted = pages * resource.getpagesize() + more_bytes
    tighter = [limit for limit in (wanted, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(tighter), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
