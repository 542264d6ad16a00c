"""The API's token: one file that only its owner can read, made when it is first needed."""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from lorasmith.files import disk_errors, fsync_folder, only_one_process, sha256_bytes, write_bytes

FOLDER, LOCK = "server", "token.lock"
TOKEN_PREFIX = "lorasmith_"
TOKEN_BYTES = 32


def server_folder(home: Path) -> Path:
    """Of what the server alone needs; others of the machine may not look in."""
    folder = home / FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def token_file(home: Path) -> Path:
    return server_folder(home) / "token"


def api_token(home: Path) -> str:
    """The token, made now if there is none."""
    path = token_file(home)
    if not path.exists():
        with only_one_process(path.with_name(LOCK)):  # a server and who asks for its token begin at once
            if not path.exists():
                return rotate_token(home)
    return path.read_text(encoding="ascii").strip()


def rotate_token(home: Path) -> str:
    """A new token; a running server takes it from its next request on, and the old one no more."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    write_private(token_file(home), f"{token}\n".encode())
    return token


def write_private(path: Path, data: bytes) -> None:
    """Like `files.write_bytes`, with mode 0600 from its first byte on."""
    write_bytes(path, data, mode=0o600)
    fsync_folder(path.parent)


def same_secret(given: str, wanted: str) -> bool:
    """In constant time, whatever their lengths."""
    return hmac.compare_digest(sha256_bytes(given.encode()), sha256_bytes(wanted.encode()))
