"""Endpoints that a user names: what is one, to which addresses it may lead (SSRF), and where its key comes from."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal
from urllib.parse import urlsplit

from lorasmith.errors import InvalidSpec
from lorasmith.schemas.teachers import Reach

Address = IPv4Address | IPv6Address
AddressKind = Literal["public", "private", "loopback", "forbidden"]

DEFAULT_PORTS = {"http": 80, "https": 443}
HOST_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
METADATA = {  # services of clouds that hand out credentials, at addresses that are not link-local
    ip_address("100.100.100.200"),  # Alibaba
    ip_address("168.63.129.16"),  # Azure
    ip_address("fd00:ec2::254"),  # AWS
    ip_address("fd20:ce::254"),  # Google
}
THIS_NETWORK = ip_network("0.0.0.0/8")  # Linux connects 0.0.0.0 to itself
NAT64 = ip_network("64:ff9b::/32")  # RFC 6052 and 8215; the last 32 bits are an IPv4 address


@dataclass(frozen=True)
class Endpoint:
    """A parsed base URL. `path` has no slash at its end."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def parse_endpoint(text: str) -> Endpoint:
    """Raises `InvalidSpec`; user names, passwords and queries are refused and not repeated, they may hold keys."""
    expected = "https://host/v1, or http://127.0.0.1:8000/v1 for a server on this machine"
    if not text.isascii() or re.search(r"[\x00-\x20\x7f\\]", text):
        raise InvalidSpec("the endpoint must have no spaces, backslashes or characters outside ASCII", hint=expected)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidSpec(f"the endpoint is not a URL: {error}", hint=expected) from None
    if parts.scheme not in DEFAULT_PORTS:
        raise InvalidSpec(
            f"the endpoint must begin with https:// or http://, got {parts.scheme or host!r}", hint=expected
        )
    if "@" in parts.netloc or "?" in text or "#" in text:
        raise InvalidSpec(
            "the endpoint must have no user name, password, query or fragment",
            hint="a key is read from an environment variable: --api-key-env NAME",
        )
    if not HOST_NAME.fullmatch(host) and not is_ipv6(host):
        raise InvalidSpec(f"the endpoint has no valid host, got {host!r}", hint=expected)
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return Endpoint(parts.scheme, host, DEFAULT_PORTS[parts.scheme] if port is None else port, path)


def is_ipv6(host: str) -> bool:
    try:
        return "%" not in host and isinstance(ip_address(host), IPv6Address)
    except ValueError:
        return False


def kind_of(address: Address) -> AddressKind:
    """`forbidden` is link-local (with the metadata service of clouds), multicast, unspecified and reserved."""
    address = innermost(address)
    if address in METADATA or address in THIS_NETWORK:
        return "forbidden"
    if address.is_loopback:
        return "loopback"
    if address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved:
        return "forbidden"
    return "public" if address.is_global else "private"


def innermost(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for: mapped, 6to4, Teredo or NAT64."""
    if isinstance(address, IPv4Address):
        return address
    inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
    if inner is None and address in NAT64:
        inner = IPv4Address(int(address) & 0xFFFFFFFF)
    return inner or address


def check_addresses(endpoint: Endpoint, addresses: list[str], reach: Reach) -> None:
    """Raise `InvalidSpec` unless every address of the host may be reached: one bad one among them is a trap."""
    for text in addresses:
        kind = kind_of(ip_address(text.partition("%")[0]))
        where = endpoint.host if endpoint.host == text else f"{endpoint.host} ({text})"
        if kind == "forbidden":
            raise InvalidSpec(
                f"the endpoint leads to {where}, a link-local, reserved or metadata address, which is never asked"
            )
        if kind == "loopback" and not reach.loopback:
            raise InvalidSpec(f"the endpoint leads to {where}, which is this machine itself")
        if kind == "private" and not reach.private:
            raise InvalidSpec(
                f"the endpoint leads to {where}, an address of a private network",
                hint="--allow-private, if that machine is meant",
            )
        if kind == "public" and endpoint.scheme == "http":
            raise InvalidSpec(
                f"the endpoint {endpoint.url} would carry rows and key unencrypted to {where}",
                hint=f"https://{endpoint.host}…",
            )


def check_endpoint(endpoint: Endpoint, reach: Reach) -> None:
    """Resolve and check now, so that a job is not queued in vain; `outgoing` checks again what it connects to."""
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidSpec(f"the host of the endpoint, {endpoint.host}, has no address: {error}") from None
    check_addresses(endpoint, [str(entry[4][0]) for entry in found], reach)


def read_key(variable: str | None, environment: Mapping[str, str]) -> str | None:
    """The key in that environment variable; raises `InvalidSpec` when there is none that a header can carry.

    A value that is no name of a variable is not repeated: it may be the key itself.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise InvalidSpec(
            "--api-key-env takes the name of an environment variable, in capitals, and never the key itself",
            hint="export TEACHER_KEY=…, then --api-key-env TEACHER_KEY",
        )
    key = environment.get(variable, "").strip()
    if not key:
        raise InvalidSpec(f"the environment variable {variable}, which should hold the key, is not set")
    if not re.fullmatch(r"[\x21-\x7e]{8,}", key):
        raise InvalidSpec(f"{variable} holds no key: expected at least 8 characters of ASCII without spaces")
    return key
