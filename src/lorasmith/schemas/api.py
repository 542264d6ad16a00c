"""What every answer of the REST API is made of: problems and pages."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import BaseModel, Field

Item = TypeVar("Item")


class FieldProblem(BaseModel):
    """One wrong field. `pointer` is a JSON pointer (RFC 6901) into what `where` names."""

    where: str = Field(description="body, query, path, header or form.", examples=["body"])
    pointer: str = Field(examples=["/training_config/learning_rate"])
    detail: str = Field(examples=["Input should be greater than 0"])


class Problem(BaseModel):
    """Why a request was not done, RFC 9457. `code` is stable, `hint` is the way out."""

    type: str = Field(
        description="`urn:lorasmith:problem:` and the code.", examples=["urn:lorasmith:problem:not_found"]
    )
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["no dataset 'suport'; did you mean 'support'?"])
    code: str = Field(examples=["not_found"])
    hint: str | None = Field(None, examples=["known datasets: support"])
    errors: list[FieldProblem] | None = Field(None, description="The wrong fields of a request that does not fit.")


class OpenAIError(BaseModel):
    message: str = Field(examples=["no such file: 'file-x'"])
    type: str = Field(examples=["not_found_error"])
    param: str | None = Field(examples=[None])
    code: str | None = Field(examples=["not_found"])


class OpenAIErrorBody(BaseModel):
    """Why a request below `/v1` was not done."""

    error: OpenAIError


class Page(BaseModel, Generic[Item]):
    """The newest first; `next_cursor` asks for the following page, and is null on the last."""

    data: list[Item]
    next_cursor: str | None = Field(None, examples=["dataset_01JD0000000000000000000000"])
