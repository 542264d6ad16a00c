"""Values of secrets: in the system's keyring where there is one, else encrypted in a file with its key beside it.

The file is AES-256-GCM with a nonce of its own and the secret's name as associated data, so that values cannot be
exchanged between names (NIST SP 800-38D). Key and file are readable for their owner alone; this keeps values out of
copies of the database, of logs and of backups that leave the key out, not from who can read the whole home.
"""

from __future__ import annotations

import base64
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lorasmith.errors import InvalidData
from lorasmith.files import read_json

KEY, VALUES = "key", "values.json"
NONCE_BYTES = 12
NO_KEYRINGS = ("keyring.backends.fail", "keyring.backends.null")


class Vault(Protocol):
    """Keeps values by name."""

    def put(self, name: str, value: str) -> None: ...
    def get(self, name: str) -> str | None: ...
    def remove(self, name: str) -> None: ...


class KeyringVault:
    """The login keyring of the user that the process runs as."""

    def __init__(self, home: Path) -> None:
        self.service = f"lorasmith {home}"

    def put(self, name: str, value: str) -> None:
        import keyring

        keyring.set_password(self.service, name, value)

    def get(self, name: str) -> str | None:
        import keyring

        return keyring.get_password(self.service, name)

    def remove(self, name: str) -> None:
        import keyring

        if keyring.get_password(self.service, name) is not None:
            keyring.delete_password(self.service, name)


class FileVault:
    """For machines without a keyring, as servers are. `write` puts bytes into a file of mode 0600, whole or not at all."""

    def __init__(self, folder: Path, write: Any) -> None:
        self.folder = folder
        self.write = write

    def put(self, name: str, value: str) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = os.urandom(NONCE_BYTES)
        sealed = AESGCM(self.key()).encrypt(nonce, value.encode(), name.encode())
        self.save({**self.values(), name: base64.b64encode(nonce + sealed).decode()})

    def get(self, name: str) -> str | None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        stored = self.values().get(name)
        if stored is None:
            return None
        sealed = base64.b64decode(stored)
        try:
            return AESGCM(self.key()).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], name.encode()).decode()
        except InvalidTag:
            raise InvalidData(
                f"the secret {name!r} cannot be read: its key or its value has changed",
                hint=f"lorasmith secrets set {name}",
            ) from None

    def remove(self, name: str) -> None:
        self.save({other: value for other, value in self.values().items() if other != name})

    def values(self) -> dict[str, str]:
        path = self.folder / VALUES
        found: dict[str, str] = read_json(path) if path.exists() else {}
        return found

    def save(self, values: dict[str, str]) -> None:
        self.write(self.folder / VALUES, json.dumps(values, indent=2).encode())

    def key(self) -> bytes:
        """Made when the first secret is."""
        path = self.folder / KEY
        if not path.exists():
            self.write(path, os.urandom(32))
        return path.read_bytes()


def has_keyring() -> bool:
    """Whether the extra `keyring` is installed and finds a keyring that keeps something."""
    if find_spec("keyring") is None:
        return False
    import keyring

    found: Any = keyring.get_keyring()
    usable = getattr(found, "backends", [found])  # a chain of several
    return any(not type(one).__module__.startswith(NO_KEYRINGS) for one in usable)
