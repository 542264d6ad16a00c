"""The OpenAPI document: FastAPI's, with our problems for errors, the token, and names that a client can be made from."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from lorasmith.api.openapi_links import add_links
from lorasmith.api.problems import MEDIA_TYPE, OPENAI_PREFIX, new_problem, openai_error
from lorasmith.api.security import PUBLIC
from lorasmith.schemas.api import OpenAIErrorBody, Problem
from lorasmith.schemas.api_jobs import StreamedEvent, StreamedStatus

OPENAPI_PATH = "/api/v1/openapi.json"
ABOUT = """Datasets, training jobs, adapters and base models of one home folder.

Every request needs `Authorization: Bearer TOKEN` (`lorasmith api-token`) or the cookie of a login, save `/healthz`, `/readyz` and
the login itself. Lists are paged by `limit` and `cursor`. What starts work answers 202 with a `Location`. Errors are RFC 9457 problems with a
stable `code` and, where there is one, a `hint`.
"""
MADE: dict[str, Any] = {}  # the document takes a second, and every application of a process has the same routes
OF_NO_ROUTE = (Problem, OpenAIErrorBody, StreamedStatus, StreamedEvent)  # errors, and the data of streams
METHODS = ("get", "put", "post", "delete", "patch", "head")
EXPLAINED = {  # status to when it comes, code and an example of its detail
    400: ("A field does not fit", "invalid_request", "body /model: Field required"),
    401: ("No token or session, or a wrong one", "unauthorized", "this needs a token or a session"),
    403: (
        "Another host name, or a page of another site",
        "forbidden",
        "the Host header says 'evil.example', which is not this server",
    ),
    404: ("Nothing has this id or name", "not_found", "no dataset 'suport'; did you mean 'support'?"),
    409: (
        "The name is taken, or the state does not allow it",
        "conflict",
        "there is already a dataset named 'support'",
    ),
    412: ("It has changed since it was read", "changed", "it has changed since"),
    413: ("More bytes than this takes", "too_large", "the body has 2000000 bytes, and this takes at most 1048576"),
    422: ("A field does not fit", "invalid_request", "body /name: Field required"),
    428: ("A change without If-Match", "precondition_missing", "this change needs If-Match"),
    429: ("Too many wrong passwords or tokens", "too_many_attempts", "too many wrong passwords or tokens"),
    507: ("The disk is full", "disk_full", "the disk is full"),
}


def describe(app: FastAPI, root_path: str = "") -> None:
    """Make `app.openapi()` this document, for a server below `root_path`."""

    def document() -> dict[str, Any]:
        if not MADE:
            MADE.update(whole(app))
        return {**MADE, "servers": [{"url": root_path}]} if root_path else MADE

    app.openapi = document  # type: ignore[method-assign]  # how FastAPI wants it extended


def whole(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
    schemas = found["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in OF_NO_ROUTE:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    require_what_is_always_sent(found)
    found["components"]["responses"] = {
        response_name(status, path): explained(status, path) for status in EXPLAINED for path in ("/", OPENAI_PREFIX)
    }
    found["components"]["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer"},
        "session": {"type": "apiKey", "in": "cookie", "name": "lorasmith_session"},
    }
    found["security"] = [{"token": []}, {"session": []}]
    for path, operations in found["paths"].items():
        for method in METHODS:
            if method in operations:
                complete(path, method, operations[method])
    add_links(found)
    return found


def require_what_is_always_sent(document: dict[str, Any]) -> None:
    """In answers, fields with a default are there too, which pydantic says of requests and answers alike as optional."""
    schemas = document["components"]["schemas"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    asked = reached(schemas, [operation.get("requestBody") for operation in operations])
    answered = reached(schemas, [operation["responses"] for operation in operations])
    for name in answered - asked:
        if "properties" in schemas[name]:
            schemas[name]["required"] = list(schemas[name]["properties"])


def reached(schemas: dict[str, Any], roots: list[Any]) -> set[str]:
    """Names of the schemas that `roots` refer to, and those that these refer to."""
    found: set[str] = set()
    left = list(roots)
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            if name in schemas and name not in found:
                found.add(name)
                left.append(schemas[name])
            left += node.values()
    return found


def complete(path: str, method: str, operation: dict[str, Any]) -> None:
    """The errors that an operation may answer, and whether it is open to all."""
    public = (method.upper(), path) in PUBLIC
    if public:
        operation["security"] = []
    statuses = {403} if public else {401, 403, 429}
    has_body = "requestBody" in operation
    parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
    if public and has_body:
        statuses |= {401, 429}
    names_others = has_body and method == "post" and not public
    if "{" in path or names_others or (path.startswith(OPENAI_PREFIX) and parameters):
        statuses.add(404)
    if has_body or parameters:
        statuses.add(400 if path.startswith(OPENAI_PREFIX) else 422)
    if has_body:
        statuses |= {400, 413}
    if method in ("put", "post", "patch", "delete") and not public:
        statuses |= {409, 507}
    if "if-match" in parameters:
        statuses |= {412, 428} if method == "put" else {412}
    for status in sorted(statuses):
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{response_name(status, path)}"}
    if path.startswith(OPENAI_PREFIX):
        operation["responses"].pop("422", None)  # FastAPI's own; theirs is 400
    operation["responses"] = dict(sorted(operation["responses"].items()))


def response_name(status: int, path: str) -> str:
    return f"OpenAI{status}" if path.startswith(OPENAI_PREFIX) else f"Problem{status}"


def explained(status: int, path: str) -> dict[str, Any]:
    description, code, detail = EXPLAINED[status]
    problem = new_problem(status, code, detail)
    if path.startswith(OPENAI_PREFIX):
        example = openai_error(problem, status).model_dump()
        schema = {"$ref": "#/components/schemas/OpenAIErrorBody"}
        return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}
    example = problem.model_dump(exclude_none=True)
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema, "example": example}}}
