"""Every error a user can meet: what was wrong, the value received, the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorasmithError(Exception):
    """Base of all errors that are shown without a traceback.

    `exit_code` is the shell's, `http_status` the REST API's, `code` is stable, `hint` is the way out.
    """

    exit_code = 1
    http_status = 500
    code = "failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidSpec(LorasmithError):
    """What was asked for does not make sense: a wrong field, type, range or combination."""

    exit_code = 2
    http_status = 422
    code = "invalid_spec"


class InvalidData(LorasmithError):
    """A file or a row is not what it should be."""

    http_status = 422
    code = "invalid_data"


class InvalidModel(LorasmithError):
    """A model or adapter folder is incomplete, damaged or of a kind that cannot be used."""

    http_status = 422
    code = "invalid_model"


class NotFound(LorasmithError):
    exit_code = 3
    http_status = 404
    code = "not_found"


class Conflict(LorasmithError):
    exit_code = 4
    http_status = 409
    code = "conflict"


class LostLease(Conflict):
    """Another process answers for the job now."""

    code = "lost_lease"


class Busy(LorasmithError):
    """The database is held by another process."""

    http_status = 503
    code = "busy"


class DamagedDatabase(LorasmithError):
    """The database file is not whole, or is gone while the folders that it lists are there."""

    http_status = 503
    code = "damaged_database"


class Unauthorized(LorasmithError):
    """The REST API was called without a valid token or session."""

    http_status = 401
    code = "unauthorized"


class Forbidden(LorasmithError):
    """The request comes from where none may come: another host name or another site's page."""

    http_status = 403
    code = "forbidden"


class TooLarge(LorasmithError):
    """More bytes than the server takes for this."""

    http_status = 413
    code = "too_large"


class TooManyAttempts(LorasmithError):
    """Wrong passwords or tokens, too often; `retry_after_s` says when to try again."""

    http_status = 429
    code = "too_many_attempts"

    def __init__(self, message: str, *, retry_after_s: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class PreconditionMissing(LorasmithError):
    """A change must say which state it changes."""

    http_status = 428
    code = "precondition_missing"


class Changed(LorasmithError):
    """What is to be changed is no longer what the caller saw."""

    http_status = 412
    code = "changed"


class DiskFull(LorasmithError):
    """`needed_bytes`: with no more free bytes than these it would fail again."""

    http_status = 507
    code = "disk_full"

    def __init__(self, message: str, *, hint: str | None = None, needed_bytes: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.needed_bytes = needed_bytes


class MissingExtra(LorasmithError):
    """An optional part is not installed."""

    http_status = 501
    code = "missing_extra"

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra `{extra}`", hint=f"pip install 'lorasmith[{extra}]'")


class TeacherFailed(LorasmithError):
    """The model that a job asks refuses every request, or cannot be reached. What it has answered is kept."""

    http_status = 502
    code = "teacher_failed"


class JobFailed(LorasmithError):
    """The engine process ended with an error; `code` is the reason code that it gave."""

    def __init__(self, message: str, *, code: str = "failed", hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.exit_code = exit_code


class Killed(JobFailed):
    """The system ended a process of ours (SIGKILL), most often because memory ran out."""


class Interrupted(LorasmithError):
    """Stopped on request, with everything saved."""

    exit_code = 5
    http_status = 409
    code = "interrupted"


class Paused(Interrupted):
    """Stopped to be resumed later."""

    code = "paused"


class Cancelled(Interrupted):
    """Stopped for good; what was saved is still there."""

    code = "cancelled"


STOPS = {error.code: error for error in (Interrupted, Paused, Cancelled)}


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when nothing is near."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or an empty string when nothing is near."""
    match = closest(name, candidates)
    return f"; did you mean {match!r}?" if match else ""
