"""`LORASMITH_*` variables, read once by the shells and passed down."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.errors import InvalidSpec

DEFAULT_PORT = 8420
PASSWORD_VARIABLE = "LORASMITH_PASSWORD"
SHORTEST_PASSWORD = 8  # characters
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


@dataclass(frozen=True)
class Settings:
    """`home` is the data directory; all rows keep paths relative to it."""

    home: Path

    @classmethod
    def read(cls, home: Path | None = None, environment: Mapping[str, str] = os.environ) -> Settings:
        chosen = home or Path(environment.get("LORASMITH_HOME") or Path.home() / ".lorasmith")
        return cls(home=chosen.expanduser().resolve())


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens, for whom, and how much it takes. Sizes are bytes.

    `allowed_hosts` are further names in the Host header, `allowed_origins` further pages that may call, `import_roots`
    the folders below which the API may name local model folders, `worker_cores` what the server's own worker may use
    (None: it has none). `root_path` is the path below which a proxy shows the server, `/x` or empty; `tls_cert` and `tls_key`
    are PEM files, with which it speaks HTTPS.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    password: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    import_roots: tuple[Path, ...] = ()
    max_body_bytes: int = 1024**2
    max_upload_bytes: int = 20 * 1024**3
    worker_cores: int | None = None
    root_path: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if not ROOT_PATH.fullmatch(self.root_path):
            raise InvalidSpec(f"a root path is like /x or /x/y, without a / at its end, got {self.root_path!r}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidSpec("TLS needs a certificate and its key", hint="give both --tls-cert and --tls-key")
        if self.password is not None and len(self.password) < SHORTEST_PASSWORD:
            raise InvalidSpec(
                f"the password must have at least {SHORTEST_PASSWORD} characters, got {len(self.password)}"
            )
        if not self.is_loopback and self.password is None:
            raise InvalidSpec(
                f"listening on {self.host} lets other machines in, which needs a password",
                hint=f"--password-stdin or {PASSWORD_VARIABLE}; or --host 127.0.0.1, for this machine alone",
            )

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def read(
        cls,
        host: str,
        port: int,
        password: str | None,
        environment: MutableMapping[str, str] = os.environ,
        worker_cores: int | None = None,
        root_path: str = "",
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> ServerSettings:
        """The password is taken out of the environment, which engine processes inherit."""
        from_environment = environment.pop(PASSWORD_VARIABLE, None)
        return cls(
            host=host,
            port=port,
            password=password if password is not None else from_environment,
            allowed_hosts=words(environment.get("LORASMITH_ALLOWED_HOSTS", ""), ","),
            allowed_origins=words(environment.get("LORASMITH_ALLOWED_ORIGINS", ""), ","),
            import_roots=tuple(
                Path(root).expanduser().resolve()
                for root in words(environment.get("LORASMITH_IMPORT_ROOTS", ""), os.pathsep)
            ),
            max_upload_bytes=byte_count(environment, "LORASMITH_MAX_UPLOAD_BYTES", cls.max_upload_bytes),
            worker_cores=worker_cores,
            root_path=root_path,
            tls_cert=tls_cert,
            tls_key=tls_key,
        )


def words(text: str, separator: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(separator) if word.strip())


def byte_count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise InvalidSpec(f"{name} takes a number of bytes above 0, got {text!r}")
    return int(text)
