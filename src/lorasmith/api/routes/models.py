"""Base models: list, add, read, forget."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from lorasmith.api.deps import CurrentSettings, CurrentWorkbench
from lorasmith.api.etags import CHANGING, IfMatch, check_match, tag
from lorasmith.api.idempotency import IdempotentRoute
from lorasmith.api.paging import Cursor, Limit, page_of
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.api import Page
from lorasmith.schemas.api_adapters import ModelRequest, ModelResource
from lorasmith.schemas.models import BaseModelEntry
from lorasmith.services.models import add_model, model_below, remove_model, show_model, starter_entry
from lorasmith.services.names import check_model_name

router = APIRouter(prefix="/api/v1/finetune/models", tags=["models"], route_class=IdempotentRoute)

ModelId = Annotated[str, Path(description="Id or name of a model.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


def model_resource(entry: BaseModelEntry) -> ModelResource:
    return ModelResource(
        id=entry.id,
        name=entry.name,
        source=entry.source,
        hub_id=entry.location if entry.source == "hub" else None,
        facts=entry.facts,
        created_at=entry.created_at,
    )


@router.get("")
def list_models(workbench: CurrentWorkbench, limit: Limit = 50, cursor: Cursor = None) -> Page[ModelResource]:
    """List base models, the newest first and the built-in one last"""
    built_in = starter_entry()
    entries = [] if cursor == built_in.id else [*workbench.models.page(limit + 1, cursor), built_in]
    return page_of([model_resource(entry) for entry in entries], limit, lambda one: one.id)


@router.post("", status_code=201)
def create_model(
    workbench: CurrentWorkbench, settings: CurrentSettings, asked: ModelRequest, response: Response
) -> ModelResource:
    """Add a hub id, or a folder below the server's import roots"""
    if (asked.hub_id is None) == (asked.folder is None):
        raise InvalidSpec("give either hub_id or folder")
    if asked.folder is not None:
        location = str(model_below(settings.import_roots, asked.folder))
    else:
        assert asked.hub_id is not None
        check_model_name(workbench, asked.hub_id)
        location = asked.hub_id
    name = asked.name or (asked.hub_id or location).rpartition("/")[2]
    found = model_resource(add_model(workbench, location, name))
    response.headers["Location"] = f"/api/v1/finetune/models/{found.id}"
    tag(response, found)
    return found


@router.get("/{model_id}")
def get_model(workbench: CurrentWorkbench, model_id: ModelId, response: Response) -> ModelResource:
    """Show a base model: architecture, size and context"""
    found = model_resource(show_model(workbench, model_id))
    tag(response, found)
    return found


@router.delete("/{model_id}", status_code=204)
def delete_model(workbench: CurrentWorkbench, model_id: ModelId, if_match: IfMatch = None) -> None:
    """Forget an added model; its files stay"""
    with CHANGING:
        seen = model_resource(show_model(workbench, model_id))
        check_match(seen, if_match, required=False)
        remove_model(workbench, seen.id)
