"""Errors as `application/problem+json` (RFC 9457): what was wrong and the way out, no traceback and no path of the server."""

from __future__ import annotations

import re
from http import HTTPStatus
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from lorasmith.errors import LorasmithError, TooManyAttempts
from lorasmith.schemas.api import FieldProblem, OpenAIError, OpenAIErrorBody, Problem

OPENAI_PREFIX = "/v1/"
MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:lorasmith:problem:"
PACKAGE = Path(__file__).parents[1]
# An absolute path with at least one folder, `/a/b`; paths of this API are none of the disk.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<-])/(?!api/)(?:[^\s/'\"`:;,()\]]+/)+(?=[^\s'\"`:;,()\]])")
CODES = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
}


def without_paths(text: str, home: Path) -> str:
    """Paths below the home folder become relative to it, other absolute ones their last part."""
    text = text.replace(f"{home}/", "").replace(str(home), "the home folder")
    return ABSOLUTE_PATH.sub("", text)


def problem_response(problem: Problem, path: str, headers: dict[str, str] | None = None) -> Response:
    """As a problem, or below `/v1` as OpenAI's clients read errors."""
    if path.startswith(OPENAI_PREFIX):
        status = 400 if problem.status == HTTPStatus.UNPROCESSABLE_ENTITY else problem.status
        return JSONResponse(openai_error(problem, status).model_dump(), status, headers)
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, status_code=problem.status, headers=headers, media_type=MEDIA_TYPE)


def new_problem(status: int, code: str, detail: str, hint: str | None = None) -> Problem:
    title = HTTPStatus(status).phrase
    return Problem(type=TYPE_PREFIX + code, title=title, status=status, detail=detail, code=code, hint=hint)


def openai_error(problem: Problem, status: int) -> OpenAIErrorBody:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    wrong = problem.errors[0].pointer.strip("/").replace("/", ".") if problem.errors else None
    hint = f" ({problem.hint})" if problem.hint else ""
    return OpenAIErrorBody(
        error=OpenAIError(message=problem.detail + hint, type=kind, param=wrong or None, code=problem.code)
    )


def problem_of(error: LorasmithError, home: Path) -> Problem:
    hint = None if error.hint is None else without_paths(error.hint, home)
    return new_problem(error.http_status, error.code, without_paths(error.message, home), hint)


def error_response(error: LorasmithError, home: Path, path: str) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, TooManyAttempts) else {}
    if error.http_status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return problem_response(problem_of(error, home), path, headers)


def field_problems(error: RequestValidationError) -> list[FieldProblem]:
    """Without the values that came in: one of them may be a secret."""
    found = []
    for problem in error.errors():
        where, *parts = problem["loc"]
        if problem["type"] == "json_invalid":
            detail, parts = f"not valid JSON: {problem['ctx']['error']} at character {parts[0] if parts else 0}", []
        else:
            detail = problem["msg"].removeprefix("Value error, ")
        escaped = (str(part).replace("~", "~0").replace("/", "~1") for part in parts)
        found.append(FieldProblem(where=str(where), pointer="".join(f"/{part}" for part in escaped), detail=detail))
    return found


def show_problems(app: FastAPI, home: Path) -> None:
    """Answer every error of `app` with a problem."""

    @app.exception_handler(LorasmithError)
    async def known(request: Request, error: LorasmithError) -> Response:
        return error_response(error, home, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> Response:
        problems = field_problems(error)
        sentences = "; ".join(f"{one.where} {one.pointer or 'as a whole'}: {one.detail}" for one in problems)
        problem = new_problem(422, "invalid_request", sentences, "GET /api/v1/openapi.json describes every field")
        return problem_response(problem.model_copy(update={"errors": problems}), request.url.path)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        code = CODES.get(HTTPStatus(error.status_code), "bad_request")
        detail = str(error.detail)
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail = f"there is nothing at {request.url.path}"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            detail = f"{request.url.path} does not take {request.method}"
        headers = dict(error.headers or {})
        return problem_response(new_problem(error.status_code, code, detail), request.url.path, headers)


def unknown_error_response(path: str) -> Response:
    """For an error that is no `LorasmithError`: a mistake of ours, of which the caller gets no detail."""
    detail = "the server met an error that it does not know"
    return problem_response(new_problem(500, "internal", detail, "its log has the traceback"), path)
