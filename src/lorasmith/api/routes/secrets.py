"""Secrets: set, list by name, remove. No route reads a value."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from lorasmith.api.deps import CurrentWorkbench
from lorasmith.schemas.secrets import LONGEST_SECRET, SECRET_NAME, Secret
from lorasmith.services.secrets import list_secrets, remove_secret, set_secret

router = APIRouter(prefix="/api/v1/secrets", tags=["secrets"])

SecretName = Annotated[str, Path(description="Name of a secret.", pattern=SECRET_NAME)]


class SecretValue(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"value": "sk-…"}]})

    value: Annotated[SecretStr, Field(min_length=1, max_length=LONGEST_SECRET)]


@router.get("")
def list_all_secrets(workbench: CurrentWorkbench) -> list[Secret]:
    """List the names of secrets, without their values"""
    return list_secrets(workbench.home)


@router.put("/{name}")
def put_secret(workbench: CurrentWorkbench, name: SecretName, given: SecretValue) -> Secret:
    """Keep a value under a name, in the place of an earlier one; it cannot be read back"""
    return set_secret(workbench.home, name, given.value.get_secret_value())


@router.delete("/{name}", status_code=204)
def delete_secret(workbench: CurrentWorkbench, name: SecretName) -> None:
    """Remove a secret"""
    remove_secret(workbench.home, name)
