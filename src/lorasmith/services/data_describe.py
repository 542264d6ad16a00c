"""`data stats`: what a dataset says, and how many tokens that is for a model, counted by an engine process."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from lorasmith.errors import MissingExtra
from lorasmith.files import new_id
from lorasmith.schemas.data import PARTS, Dataset, DatasetFormat, Example, Part
from lorasmith.schemas.estimation import Estimate
from lorasmith.schemas.jobs import JobKind, JobOrder
from lorasmith.schemas.statistics import (
    DatasetStatistics,
    Distribution,
    PartContent,
    StatisticsInputs,
    StatisticsSpec,
    TokenStatistics,
)
from lorasmith.services.data import part_path, stored_lines, tokens_folder
from lorasmith.services.data_checks import LanguageCheck
from lorasmith.services.data_sources import find_dataset, named_dataset
from lorasmith.services.data_statistics import PartStatistics
from lorasmith.services.estimation import estimate
from lorasmith.services.jobs import Watch
from lorasmith.services.models import resolve_model
from lorasmith.services.previews import preview_folder, run_preview
from lorasmith.services.training import build_spec
from lorasmith.services.workbench import Workbench

MOST_LANGUAGES_LOOKED_AT = 10_000  # examples of a part; telling one takes about a millisecond


def describe_dataset(workbench: Workbench, spec: StatisticsSpec, watch: Watch) -> DatasetStatistics:
    """Content of each part, and tokens where a model is named. Nothing but the token store is left."""
    dataset = find_dataset(workbench, spec.data) if spec.model else named_dataset(workbench, spec.data)
    parts = [part for part in PARTS if dataset.part_sizes.get(part)]
    return DatasetStatistics(
        dataset=dataset.name,
        sha256=dataset.sha256,
        format=dataset.format,
        fates=dataset.fates,
        parts={part: part_content(workbench, dataset, part) for part in parts},
        tokens=count_tokens(workbench, dataset, parts, spec, watch) if spec.model else None,
    )


def part_content(workbench: Workbench, dataset: Dataset, part: Part) -> PartContent:
    gathered = PartStatistics()
    identify = language_check()
    languages: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    every = -(-dataset.part_sizes[part] // MOST_LANGUAGES_LOOKED_AT)
    for number, line in enumerate(stored_lines(part_path(workbench, dataset, part), dataset)):
        values: dict[str, Any] = json.loads(line)
        gathered.add(values, part)
        if identify is not None and number % every == 0:
            languages[identify.language(Example.model_validate(values), dataset.format)] += 1
        if dataset.format is DatasetFormat.CLASSIFICATION:
            labels[values["messages"][-1]["content"]] += 1
    return PartContent(
        examples=gathered.sizes[part],
        turns=Distribution.of(gathered.turns),
        prompt_characters=Distribution.of(gathered.prompts),
        answer_characters=Distribution.of(gathered.answers),
        roles=dict(gathered.roles),
        languages=dict(languages.most_common()) if identify is not None else None,
        languages_of=languages.total(),
        labels=dict(labels.most_common()) if labels else None,
    )


def language_check() -> LanguageCheck | None:
    try:
        return LanguageCheck([])
    except MissingExtra:
        return None


def count_tokens(
    workbench: Workbench, dataset: Dataset, parts: list[Part], spec: StatisticsSpec, watch: Watch
) -> TokenStatistics:
    assert spec.model is not None
    model = resolve_model(workbench, spec.model, weights=False)
    inputs = StatisticsInputs(
        model_name=model.name,
        model_folder=model.location,
        examples_files={part: str(part_path(workbench, dataset, part)) for part in parts},
        tokens_folder=str(tokens_folder(workbench, dataset.id)),
    )
    job_id = new_id("job")
    order = JobOrder(id=job_id, kind=JobKind.STATISTICS, spec=spec.model_dump(), inputs=inputs.model_dump())
    return TokenStatistics.model_validate(run_preview(preview_folder(workbench, job_id), order, watch))


def estimate_run(workbench: Workbench, spec: StatisticsSpec, preset: str | None, watch: Watch) -> Estimate:
    """Of training the model on the dataset by the preset, with the length of the spec where it was given."""
    asked = {"model": spec.model, "data": spec.data, "template": spec.template, "preset": preset}
    length = [f"training.max_seq_length={spec.max_seq_length}"] if "max_seq_length" in spec.model_fields_set else []
    return estimate(workbench, build_spec(asked, assignments=length, home=workbench.home), watch)
