"""A server that speaks the protocol of OpenAI's `/v1/chat/completions` and answers from rules, with faults on demand.

It reads the prompts of `engine/augmentation/prompts.py`: the row is the JSON object of the user message. Every request
and every answer that was sent whole is counted by the row that it is about.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "canary-5f1c0e7ab2-key"
JSON = "application/json"


@dataclass(frozen=True)
class Reply:
    """What is sent. `cut` sends only so many bytes of the body; `hang_s` waits before it."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = JSON
    cut: int | None = None
    hang_s: float = 0.0


Rule = Callable[[dict[str, Any], int], Reply | None]  # the request with its key, and how often its row was asked before


@dataclass
class Stub:
    """`rule` may answer instead of the usual answer. Counts are by `subject_of` the request."""

    rule: Rule | None = None
    needs_key: bool = False
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    delay_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


def material_of(request: dict[str, Any]) -> dict[str, Any]:
    material: dict[str, Any] = json.loads(request["messages"][1]["content"])
    return material


def subject_of(request: dict[str, Any]) -> str:
    """The text that a request is about."""
    material = material_of(request)
    if "request" in material:
        return str(material["request"])
    return str(material["text"] if "text" in material else material["conversation"][-1]["content"])


def texts_for(request: dict[str, Any]) -> dict[str, Any]:
    """A plausible answer: as many texts as were asked for, each different from its source."""
    task, material, subject = request["messages"][0]["content"], material_of(request), subject_of(request)
    wanted = int(re.search(r"exactly (\d+) string", task)[1])  # type: ignore[index]
    if "Reword" in task:
        texts = [f"In other words, variant {n}: could somebody tell me this: {subject}" for n in range(wanted)]
    elif "reasoning" in task:
        texts = [f"Step 1: look at what is asked. Step 2 of way {n}: weigh it up." for n in range(wanted)]
    elif "preference" in task:
        texts = [f"Sorry, the shop has been closed since {1990 + n}." for n in range(wanted)]
    elif "Add the ISO" in task:
        return {"language": "en", "texts": [f"En français, s'il vous plaît: {material['text']}"]}
    else:
        texts = [f"Back from another tongue {n}: {material['text'].split(': ', 1)[-1]}" for n in range(wanted)]
    return {"texts": texts}


def completion(content: Any, *, finish_reason: str = "stop", usage: bool = True) -> bytes:
    """A chat completion whose message says `content`, as JSON unless it is a text."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    value: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "stub-1",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}],
    }
    if usage:
        value["usage"] = {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 70}
    return json.dumps(value).encode()


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        stub = self.stub
        subject = subject_of(request)
        with stub.lock:
            before = stub.asked[subject]
            stub.asked[subject] += 1
            stub.requests.append(request)
            stub.times.append(time.monotonic())
            stub.under_way += 1
            stub.most_under_way = max(stub.most_under_way, stub.under_way)
        try:
            if stub.delay_s:
                time.sleep(stub.delay_s)
            reply = self.answer_to(request, before)
            if reply.hang_s:
                time.sleep(reply.hang_s)
        finally:
            with stub.lock:
                stub.under_way -= 1  # before the client can have the answer and ask the next one
        self.reply(reply, subject)

    def answer_to(self, request: dict[str, Any], before: int) -> Reply:
        if self.path != "/v1/chat/completions":
            return error(404, f"no route {self.path}")
        if self.stub.needs_key and self.headers.get("authorization") != f"Bearer {KEY}":
            return error(401, f"wrong key {self.headers.get('authorization')}", "invalid_api_key")
        keyed = {**request, "authorization": self.headers.get("authorization")}
        special = self.stub.rule(keyed, before) if self.stub.rule else None
        return special or Reply(body=completion(texts_for(request)))

    def reply(self, reply: Reply, subject: str) -> None:
        try:
            self.send_response(reply.status)
            self.send_header("content-type", reply.kind)
            self.send_header("content-length", str(len(reply.body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body[: reply.cut])
            self.wfile.flush()
        except OSError:  # the client has gone
            return
        if reply.cut is not None:
            self.close_connection = True
        elif reply.status == 200:
            with self.stub.lock:
                self.stub.answered[subject] += 1

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed reset their connections."""


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    class Bound(Handler):
        pass

    Bound.stub = stub
    server = Server(("127.0.0.1", 0), Bound)
    stub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
