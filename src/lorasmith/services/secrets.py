"""Secrets of the home folder: keys of teachers, hubs and trackers. Names are listed, values only handed to what needs them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasmith.errors import InvalidSpec, NotFound, did_you_mean
from lorasmith.files import disk_errors, only_one_process, read_json
from lorasmith.schemas.secrets import LONGEST_SECRET, SECRET_NAME, Secret
from lorasmith.services.access import write_private
from lorasmith.store.secrets import FileVault, KeyringVault, Vault, has_keyring

FOLDER, NAMES = "secrets", "names.json"


def secrets_folder(home: Path) -> Path:
    folder = home / FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@contextmanager
def changing(home: Path) -> Iterator[dict[str, Secret]]:
    """The known secrets, stored again at the end; one process at a time."""
    folder = secrets_folder(home)
    with only_one_process(folder / "lock"):
        known = {secret.name: secret for secret in list_secrets(home)}
        yield known
        kept = [secret.model_dump(mode="json") for secret in known.values()]
        write_private(folder / NAMES, json.dumps(kept, indent=2).encode())


def list_secrets(home: Path) -> list[Secret]:
    """By name, without values."""
    path = home / FOLDER / NAMES
    found = [Secret.model_validate(one) for one in read_json(path)] if path.exists() else []
    return sorted(found, key=lambda secret: secret.name)


def set_secret(home: Path, name: str, value: str) -> Secret:
    """Keep a value under a name, in the place of an earlier one."""
    if not re.fullmatch(SECRET_NAME, name):
        raise InvalidSpec(
            f"the name of a secret has letters, digits and . _ - and begins with a letter, at most 64, got {name[:80]!r}"
        )
    if not value or len(value) > LONGEST_SECRET:
        raise InvalidSpec(f"a secret has 1 to {LONGEST_SECRET} characters, got {len(value)}")
    with changing(home) as known:
        secret = Secret(name=name, kept_in="keyring" if has_keyring() else "file")
        earlier = known.get(name)
        vault(home, secret).put(name, value)
        if earlier is not None and earlier.kept_in != secret.kept_in:
            vault(home, earlier).remove(name)
        known[name] = secret
    return secret


def get_secret(home: Path, name: str) -> str:
    """The value, for what is about to use it. Raises `NotFound`."""
    secret = require(home, name)
    value = vault(home, secret).get(name)
    if value is None:
        raise NotFound(
            f"the secret {name!r} is no longer in the {secret.kept_in}", hint=f"lorasmith secrets set {name}"
        )
    return value


def remove_secret(home: Path, name: str) -> Secret:
    with changing(home) as known:
        secret = require(home, name)
        vault(home, secret).remove(name)
        del known[name]
    return secret


def require(home: Path, name: str) -> Secret:
    known = {secret.name: secret for secret in list_secrets(home)}
    if name not in known:
        raise NotFound(f"no secret {name!r}{did_you_mean(name, known)}", hint="lorasmith secrets list")
    return known[name]


def vault(home: Path, secret: Secret) -> Vault:
    return KeyringVault(home) if secret.kept_in == "keyring" else FileVault(secrets_folder(home), write_private)
