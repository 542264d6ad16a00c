"""Links of the OpenAPI document: which operations take the id that an answer holds, and what else it leads to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NOUNS = {  # schema of an answer: below which path its id is taken, and under which name
    "DatasetResource": ("/api/v1/finetune/datasets/", "dataset_id"),
    "UploadResource": ("/api/v1/finetune/uploads/", "upload_id"),
    "Conversion": ("/api/v1/finetune/conversions/", "conversion_id"),
    "JobResource": ("/api/v1/finetune/jobs/", "job_id"),
    "AdapterResource": ("/api/v1/finetune/adapters/", "adapter_id"),
    "ExportResource": ("/api/v1/finetune/exports/", "export_id"),
    "ModelResource": ("/api/v1/finetune/models/", "model_id"),
    "PresetResource": ("/api/v1/finetune/presets/", "preset_id"),
    "EstimateResource": ("/api/v1/finetune/estimate/", "estimate_id"),
    "OpenAIFile": ("/v1/files/", "file_id"),
    "FineTuningJobResource": ("/v1/fine_tuning/jobs/", "job_id"),
}
BODIES = {  # schema of an answer: operations whose body takes its id, and the rest of a body that they take
    "DatasetResource": {
        "create_job": {"base_model": "starter", "dataset_id": "{id}", "preset": "tiny"},
        "convert_dataset": {"dataset_id": "{id}"},
    },
    "OpenAIFile": {"create_fine_tuning_job": {"model": "starter", "training_file": "{id}"}},
}
METHODS = ("get", "put", "post", "delete", "patch")
FIRST_OF_LIST = "$response.body#/data/0/id"
Links = dict[str, dict[str, Any]]


def add_links(document: dict[str, Any]) -> None:
    """Give each answer with an id, or a page of them, the links of its noun; each link stands once, in `components`."""
    pages = {f"Page_{schema}_": schema for schema in NOUNS} | {
        "FileList": "OpenAIFile",
        "JobList": "FineTuningJobResource",
    }
    components: Links = {}
    for _, operation in operations(document):
        for status, response in operation["responses"].items():
            contents = response.get("content", {}).values() if status.startswith("2") else ()
            name = next((content["schema"].get("$ref", "") for content in contents), "").rpartition("/")[2]
            schema = pages.get(name, name)
            if schema in NOUNS:
                links = links_of(document, schema, FIRST_OF_LIST if name in pages else "$response.body#/id")
                suffix = "_of_first" if name in pages else ""
                response["links"] = {one: {"$ref": f"#/components/links/{schema}_{one}{suffix}"} for one in links}
                components |= {f"{schema}_{one}{suffix}": link for one, link in links.items()}
    document["components"]["links"] = dict(sorted(components.items()))


def links_of(document: dict[str, Any], schema: str, source: str) -> Links:
    below, parameter = NOUNS[schema]
    found: Links = {
        operation["operationId"]: {"operationId": operation["operationId"], "parameters": {parameter: source}}
        for path, operation in operations(document)
        if path.startswith(f"{below}{{{parameter}}}")
    }
    for operation_id, body in BODIES.get(schema, {}).items():
        filled = {field: source if value == "{id}" else value for field, value in body.items()}
        found[operation_id] = {"operationId": operation_id, "requestBody": filled}
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method in METHODS:
            if method in methods:
                yield path, methods[method]
