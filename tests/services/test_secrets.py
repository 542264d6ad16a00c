"""Values of secrets: kept, handed out, and nowhere else on the disk."""

from __future__ import annotations

import base64
import json
import stat
from collections.abc import Iterator
from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend

from lorasmith.errors import InvalidData, InvalidSpec, NotFound
from lorasmith.services.secrets import get_secret, list_secrets, remove_secret, set_secret

VALUE = "sk-canary-1f6b9f0c"


@pytest.fixture
def headless() -> Iterator[None]:
    from keyring.backends.fail import Keyring

    before = keyring.get_keyring()
    keyring.set_keyring(Keyring())
    yield
    keyring.set_keyring(before)


class MemoryKeyring(KeyringBackend):
    """A keyring as the library's own tests have one."""

    priority = 1  # type: ignore[assignment]  # how backends of the library say that they work

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, str], str] = {}

    def set_password(self, service: str, username: str, password: str) -> None:
        self.values[service, username] = password

    def get_password(self, service: str, username: str) -> str | None:
        return self.values.get((service, username))

    def delete_password(self, service: str, username: str) -> None:
        del self.values[service, username]


@pytest.mark.usefixtures("headless")
def test_without_a_keyring_a_value_is_kept_encrypted_for_its_owner_alone(tmp_path: Path) -> None:
    assert set_secret(tmp_path, "openai", VALUE).kept_in == "file"
    assert get_secret(tmp_path, "openai") == VALUE
    files = [path for path in (tmp_path / "secrets").iterdir() if path.name != "lock"]
    assert {path.name for path in files} == {"key", "values.json", "names.json"}
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert VALUE.encode() not in path.read_bytes()
        assert base64.b64encode(VALUE.encode()) not in path.read_bytes()
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700


@pytest.mark.usefixtures("headless")
def test_a_value_belongs_to_its_name_and_key(tmp_path: Path) -> None:
    set_secret(tmp_path, "a", "first")
    set_secret(tmp_path, "b", "second")
    path = tmp_path / "secrets" / "values.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({"a": values["b"], "b": values["a"]}))
    with pytest.raises(InvalidData, match="the secret 'a' cannot be read: its key or its value has changed"):
        get_secret(tmp_path, "a")
    path.write_text(json.dumps(values))
    assert get_secret(tmp_path, "a") == "first"
    (tmp_path / "secrets" / "key").write_bytes(bytes(32))
    with pytest.raises(InvalidData):
        get_secret(tmp_path, "a")


@pytest.mark.usefixtures("headless")
def test_the_same_value_is_never_written_the_same_way_twice(tmp_path: Path) -> None:
    set_secret(tmp_path, "a", VALUE)
    first = (tmp_path / "secrets" / "values.json").read_text()
    set_secret(tmp_path, "a", VALUE)
    assert (tmp_path / "secrets" / "values.json").read_text() != first


def test_a_keyring_is_taken_where_there_is_one_and_takes_over(tmp_path: Path, headless: None) -> None:
    set_secret(tmp_path, "a", "old")
    ring = MemoryKeyring()
    keyring.set_keyring(ring)
    assert get_secret(tmp_path, "a") == "old"
    assert set_secret(tmp_path, "a", VALUE).kept_in == "keyring"
    assert list(ring.values.values()) == [VALUE]
    assert get_secret(tmp_path, "a") == VALUE
    assert json.loads((tmp_path / "secrets" / "values.json").read_text()) == {}
    remove_secret(tmp_path, "a")
    assert ring.values == {}


@pytest.mark.usefixtures("headless")
def test_a_removed_secret_is_gone(tmp_path: Path) -> None:
    set_secret(tmp_path, "openai", VALUE)
    remove_secret(tmp_path, "openai")
    assert list_secrets(tmp_path) == []
    with pytest.raises(NotFound, match="no secret 'openai'"):
        get_secret(tmp_path, "openai")


@pytest.mark.parametrize("name", ["", "1a", "a/b", "../a", "a" * 65, "a b"])
def test_a_name_is_a_word(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="the name of a secret has letters"):
        set_secret(tmp_path, name, VALUE)
