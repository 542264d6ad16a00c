"""One request to an OpenAI-compatible `/chat/completions`, and what came back: a whole answer, or why there is none.

Protocol: platform.openai.com/docs/api-reference/chat/create, without streaming.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from lorasmith.endpoints import Endpoint
from lorasmith.errors import LorasmithError, TeacherFailed
from lorasmith.outgoing import CheckedTransport, outgoing_client
from lorasmith.schemas.teachers import FailureReason, Reach, TeacherSpec

MAX_RESPONSE_BYTES = 4 * 1024 * 1024
MAX_RETRY_AFTER_S = 600.0
RETRIED_STATUSES = {408, 409, 425, 429}  # and 5xx
HOPELESS_STATUSES = {401, 402, 403, 404, 405}  # the next row would meet the same
SHOWN_CHARS = 200
KEY_REPLACEMENT = "[api key]"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """A whole answer. Token counts are None where the endpoint gives none."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str | None


class NoAnswer(Exception):
    """One attempt brought no whole answer. `again`: another attempt may; `wait_s`: not before so many seconds."""

    def __init__(
        self, reason: FailureReason, sentence: str, *, again: bool = True, wait_s: float | None = None
    ) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence
        self.again = again
        self.wait_s = wait_s


class TeacherClient:
    """`key` goes into one header, and is taken out of whatever comes back. Close it inside the loop that used it."""

    def __init__(self, spec: TeacherSpec, endpoint: Endpoint, reach: Reach, key: str | None) -> None:
        self.spec = spec
        self.endpoint = endpoint
        self.key = key
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "lorasmith"}
        self.headers = {**headers, **({"authorization": f"Bearer {key}"} if key else {})}
        self.http = outgoing_client(
            CheckedTransport(endpoint, reach, connections=spec.concurrency), timeout_s=spec.timeout_s
        )

    async def aclose(self) -> None:
        await self.http.aclose()

    async def ask(self, messages: Messages) -> Answer:
        """Raises `NoAnswer`, or `TeacherFailed` where no other request would fare better."""
        body: dict[str, Any] = {
            "model": self.spec.model,
            "messages": messages,
            "max_tokens": self.spec.max_tokens,
            "stream": False,
        }
        if self.spec.temperature is not None:
            body["temperature"] = self.spec.temperature
        try:
            async with (
                asyncio.timeout(self.spec.timeout_s),
                self.http.stream(
                    "POST", f"{self.endpoint.url}/chat/completions", json=body, headers=self.headers
                ) as response,
            ):
                content = await whole_body(response)
        except (TimeoutError, httpx.TimeoutException):
            raise NoAnswer("timeout", f"no whole answer within {self.spec.timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise NoAnswer("connection", self.shown(f"{type(error).__name__}: {error}")) from None
        if response.status_code != 200:
            raise self.refusal(response, content)
        return self.answer(response, content)

    def refusal(self, response: httpx.Response, content: bytes) -> NoAnswer | LorasmithError:
        status = response.status_code
        code, said = error_of(content)
        sentence = self.shown(f"HTTP {status}" + (f": {said}" if said else ""))
        if 300 <= status < 400:
            return TeacherFailed(
                f"the endpoint {self.endpoint.host} redirects (HTTP {status}), which is not followed",
                hint="give the address that it redirects to as --endpoint",
            )
        if status in HOPELESS_STATUSES or code == "insufficient_quota":
            hints = {
                401: "--api-key-env NAME names the environment variable that holds the key",
                403: "--api-key-env NAME names the environment variable that holds the key",
                404: "check --endpoint (it usually ends in /v1) and --model",
            }
            return TeacherFailed(f"the teacher refuses: {sentence}", hint=hints.get(status))
        if status in RETRIED_STATUSES or status >= 500:
            wait_s = retry_after_s(response.headers.get("retry-after"))
            if wait_s is not None and wait_s > MAX_RETRY_AFTER_S:
                return TeacherFailed(
                    f"the teacher asks to wait {wait_s:.0f} s: {sentence}",
                    hint="resume the job later; what has been answered is kept",
                )
            return NoAnswer("rate-limited" if status == 429 else "server-error", sentence, wait_s=wait_s)
        return NoAnswer("refused", sentence, again=False)

    def answer(self, response: httpx.Response, content: bytes) -> Answer:
        """Raises `NoAnswer` for what is no response of the protocol. One that holds no choice is an empty answer."""
        kind = response.headers.get("content-type", "")
        if "json" not in kind.lower():
            raise NoAnswer(
                "malformed-response", self.shown(f"expected JSON, got content of type {kind or 'unknown'!r}")
            )
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise NoAnswer("malformed-response", self.shown(f"not JSON: {error}")) from None
        try:
            choices = value["choices"]
            message = choices[0]["message"] if choices else {}
            text = message.get("content") or ""
            if not isinstance(text, str):
                raise TypeError(f"content is {type(text).__name__}")
            reason = choices[0].get("finish_reason") if choices else None
            usage = value.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (KeyError, TypeError, AttributeError, IndexError) as error:  # another attempt would cost the same again
            sentence = self.shown(f"not a chat completion: {type(error).__name__}: {error}")
            raise NoAnswer("malformed-response", sentence, again=False) from None
        model = value.get("model")
        return Answer(
            text=self.redacted(whole_characters(text)),
            finish_reason=reason if isinstance(reason, str) else None,
            prompt_tokens=count(counts[0]),
            completion_tokens=count(counts[1]),
            model=self.shown(model) if isinstance(model, str) else None,
        )

    def redacted(self, text: str) -> str:
        return text.replace(self.key, KEY_REPLACEMENT) if self.key else text

    def shown(self, text: str) -> str:
        """One short line for people and logs, without the key and without characters that steer a terminal."""
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+", " ", self.redacted(whole_characters(text)))
        return line if len(line) <= SHOWN_CHARS else f"{line[:SHOWN_CHARS]}…"


async def whole_body(response: httpx.Response) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise NoAnswer("malformed-response", "the answer is compressed, though that was not asked for", again=False)
    received = bytearray()
    async for chunk in response.aiter_raw():
        received += chunk
        if len(received) > MAX_RESPONSE_BYTES:
            raise NoAnswer("too-large", f"the answer has more than {MAX_RESPONSE_BYTES:,} bytes", again=False)
    return bytes(received)


def error_of(content: bytes) -> tuple[str | None, str]:
    """(code, message) of `{"error": {"code": …, "message": …}}`, or the text itself."""
    try:
        error = json.loads(content)["error"]
        code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
        return code if isinstance(code, str) else None, str(message or "")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, content[: 4 * SHOWN_CHARS].decode("utf-8", "replace").strip()


def retry_after_s(value: str | None) -> float | None:
    """Seconds or an HTTP date (RFC 9110, 10.2.3); None for anything else."""
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def whole_characters(text: str) -> str:
    """Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, as U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
