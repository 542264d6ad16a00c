"""Evaluations: base against base + adapter on held-out examples, paired example by example."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.data import Part
from lorasmith.schemas.jobs import now
from lorasmith.schemas.training import QuantizationName

MetricName = Literal["exact_match", "parses", "stopped", "loss", "token_accuracy"]


class EvaluationSpec(BaseModel):
    """What `lorasmith eval` was asked to measure."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    adapter: str | None = Field(None, description="Adapter to compare with its base; absent: the base alone.")
    model: str | None = Field(None, description="Base model, when there is no adapter.")
    data: str
    template: str | None = Field(None, description="Chat template for a base without one: `chatml` or `plain`.")
    part: Part = "test"
    limit: int | None = Field(None, ge=1, description="At most this many examples, the first by id.")
    shots: int = Field(
        3, ge=0, le=16, description="Also measure the base with this many training examples in its prompt."
    )
    max_new_tokens: int = Field(160, ge=1)
    batch_size: int = Field(64, ge=1)
    quantization: QuantizationName = Field("none", description="The base in 4 or 8 bits, as QLoRA trains on it.")
    double_quantization: bool = Field(True, description="With nf4 and fp4, the scales of blocks are quantised too.")
    resamples: int = Field(10_000, ge=100, description="Bootstrap resamples.")
    seed: int = 0
    metrics: list[Literal["exact_match", "parses"]] | None = Field(
        None, description="Answer metrics; by default exact_match, and parses when the reference answers are Python."
    )


class EvaluationInputs(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_folder: str
    adapter_name: str | None
    adapter_folder: str | None
    dataset_name: str
    dataset_id: str | None = None
    dataset_sha256: str | None = None
    examples_file: str
    shots_file: str | None
    training_events: str | None = Field(None, description="events.jsonl of the training job, for the loss curve.")


class Interval(BaseModel):
    """A mean with its 95 % percentile bootstrap interval over examples."""

    mean: float
    low: float
    high: float


class ConditionResult(BaseModel):
    """One of `base`, `base + k examples`, `adapter`, over the same examples."""

    name: str
    examples: int
    metrics: dict[str, Interval]
    perplexity: float | None
    latency_s: Interval | None = Field(
        description="Seconds from the start of a batch to the end of an answer; None where nothing was generated."
    )
    generated_tokens_per_s: float


class Comparison(BaseModel):
    """Paired difference `treatment - baseline`, resampled over examples."""

    baseline: str
    treatment: str
    metric: str
    difference: Interval


class ExampleRecord(BaseModel):
    """One example under every condition, for the report and for reading failures."""

    example_id: str
    prompt: str
    reference: str
    answers: dict[str, str]
    metrics: dict[str, dict[str, float]]


class Evaluation(BaseModel):
    """A finished evaluation; `folder` holds `evaluation.json`, `examples.jsonl` and `report.html`."""

    id: str
    name: str
    adapter: str | None
    model: str
    dataset: str
    dataset_id: str | None = Field(None, description="Of the version whose part was measured on.")
    dataset_sha256: str | None = None
    part: Part
    conditions: list[ConditionResult]
    comparisons: list[Comparison]
    peak_memory_bytes: int
    settings: dict[str, Any]
    folder: str
    created_at: datetime = Field(default_factory=now)
