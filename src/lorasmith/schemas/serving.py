"""One prompt or conversation put to a model in an engine process."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class GenerationSpec(BaseModel):
    """Sampling of an answer; temperature 0 is greedy."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    adapter: str | None = None
    model: str | None = None
    prompt: str | None = Field(None, description="One user turn; absent: read turns as JSON lines from standard input.")
    system: str | None = None
    raw: bool = Field(False, description="Continue the prompt as plain text, without the chat template.")
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: int = 0


class GenerationInputs(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_folder: str
    adapter_folder: str | None = None


class GenerationResult(BaseModel):
    text: str
    stopped: bool = Field(description="The model ended its turn, rather than reaching max_new_tokens.")
    prompt_tokens: int
    generated_tokens: int
    seconds: float
