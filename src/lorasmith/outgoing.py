"""The way out: HTTP to one endpoint, and never to where it must not lead (SSRF).

The host is resolved here, every address that it has is checked, and the connection goes to an address that was checked,
so that a name which changes its answer between check and use (DNS rebinding) gains nothing. Redirects are not followed,
and proxies and other settings of the environment are not used.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

import httpx

from lorasmith.endpoints import DEFAULT_PORTS, Endpoint, check_addresses
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.teachers import Reach

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve_host(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class CheckedTransport(httpx.AsyncBaseTransport):
    """Carries requests to one endpoint, over connections to addresses of its host that were checked.

    The name is resolved once, and again after no address could be connected to. TLS still asks for the name.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        reach: Reach,
        *,
        connections: int,
        resolve: Resolve = resolve_host,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.reach = reach
        self.resolve = resolve
        self.addresses: list[str] = []
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        verify = tls or endpoint.scheme == "https"  # reading the certificates takes 0.3 s, which http does without
        self.inner = httpx.AsyncHTTPTransport(trust_env=False, limits=limits, verify=verify)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        asked = (url.scheme, url.host, url.port or DEFAULT_PORTS.get(url.scheme))
        if asked != (self.endpoint.scheme, self.endpoint.host, self.endpoint.port):
            raise InvalidSpec(f"a request for {url.host} is not one for the endpoint {self.endpoint.host}")
        addresses = self.addresses or await self.checked_addresses(request)
        request.extensions = {**request.extensions, "sni_hostname": self.endpoint.host}
        failure: httpx.TransportError | None = None
        for address in addresses:
            request.url = url.copy_with(host=address)
            try:
                response = await self.inner.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
                continue
            self.addresses = [address, *(other for other in addresses if other != address)]
            return response
        self.addresses = []
        raise failure or httpx.ConnectError(f"{self.endpoint.host} has no address", request=request)

    async def checked_addresses(self, request: httpx.Request) -> list[str]:
        try:
            addresses = await self.resolve(self.endpoint.host, self.endpoint.port)
        except OSError as error:
            raise httpx.ConnectError(f"{self.endpoint.host} has no address: {error}", request=request) from error
        check_addresses(self.endpoint, addresses, self.reach)
        return addresses

    async def aclose(self) -> None:
        await self.inner.aclose()


def outgoing_client(transport: CheckedTransport, *, timeout_s: float) -> httpx.AsyncClient:
    """A client that follows no redirect and takes nothing from the environment."""
    return httpx.AsyncClient(transport=transport, timeout=timeout_s, trust_env=False, follow_redirects=False)
