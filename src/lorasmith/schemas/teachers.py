"""Teachers: models behind an OpenAI-compatible endpoint that answer for a job, and the ledger of what they were asked."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from lorasmith.schemas.jobs import now

FailureReason = Literal[
    "rate-limited", "server-error", "timeout", "connection", "malformed-response", "too-large", "refused"
]


class Reach(BaseModel):
    """Where requests may lead besides public addresses. The shell decides it, never the one who names the endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loopback: bool = False
    private: bool = False


class TeacherSpec(BaseModel):
    """Which model to ask, how fast, and where to stop."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    endpoint: str = Field(description="Base URL of the API, such as https://api.openai.com/v1.")
    model: str = Field(min_length=1, description="Name of the model at the endpoint.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the key; absent: none is sent.")
    temperature: float | None = Field(0.8, ge=0, le=2, description="Absent: the endpoint's own.")
    max_tokens: int = Field(1024, ge=1, description="Longest answer; one that is cut there is rejected.")
    concurrency: int = Field(4, ge=1, le=64, description="Requests under way at once.")
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0, description="Prompt and answer together.")
    budget_requests: int | None = Field(None, ge=1, description="Requests of the whole job, repeated ones included.")
    budget_tokens: int | None = Field(None, ge=1, description="Tokens of all prompts and answers of the whole job.")
    timeout_s: float = Field(120.0, gt=0, description="From sending a request to the last byte of its answer.")
    max_attempts: int = Field(5, ge=1, le=20, description="Of one request; the later ones after growing pauses.")
    retry_base_s: float = Field(1.0, gt=0, description="Longest pause before the second attempt; it doubles.")


class Asked(BaseModel):
    """A request is about to be sent."""

    event: Literal["asked"] = "asked"
    time: datetime = Field(default_factory=now)
    request: str
    attempt: int


class Answered(BaseModel):
    """A whole answer has come; it is never asked for again. `estimated`: the endpoint did not count the tokens."""

    event: Literal["answered"] = "answered"
    time: datetime = Field(default_factory=now)
    request: str
    text: str
    finish_reason: str | None = None
    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False
    model: str | None = None
    seconds: float


class Unanswered(BaseModel):
    """An attempt brought no whole answer."""

    event: Literal["unanswered"] = "unanswered"
    time: datetime = Field(default_factory=now)
    request: str
    attempt: int
    reason: FailureReason
    sentence: str


RequestLine = Annotated[Asked | Answered | Unanswered, Field(discriminator="event")]
REQUEST_LINE: TypeAdapter[Asked | Answered | Unanswered] = TypeAdapter(RequestLine)
