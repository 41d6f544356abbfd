"""Which hosts the gateway may fetch media from: public ones, and those that the operator allows.

The check is where the connection is made, not where the address is read: a host name is resolved once, every address it
has is checked, and the connection goes to one of those checked addresses. So no spelling of an address, no redirect and
no name that changes its answer between check and use (DNS rebinding; CVE-2025-6242) reaches the inside. TLS still
verifies the name, and the Host header still carries it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import httpcore
import httpx

from nvila.errors import ForbiddenURL, InvalidMedia, InvalidRequest, MediaUnavailable

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_UNKNOWN = (socket.EAI_NONAME, socket.EAI_NODATA)
"""What a name server says of a name that does not exist, or has no address; everything else is its own trouble."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: a public IPv4 address behind a translator
_NEVER = (
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # RFC 8215: translation for local use
    ipaddress.IPv6Network("2002::/16"),  # 6to4: any IPv4 address inside, routing long gone
    ipaddress.IPv6Network("2001::/32"),  # Teredo: the same
    ipaddress.IPv6Network("::/96"),  # IPv4-compatible, deprecated
    ipaddress.IPv6Network("fec0::/10"),  # site-local, deprecated
    ipaddress.IPv6Network("3fff::/20"),  # RFC 9637: documentation; Python 3.11 does not know it
    ipaddress.IPv6Network("5f00::/16"),  # RFC 9602: segments of a provider's own routing
    ipaddress.IPv4Network("192.0.0.0/24"),  # IETF protocol assignments
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv4Network("100.64.0.0/10"),  # carrier-grade NAT; some clouds keep metadata here
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's platform address: public by form, internal by use
)


LOOPBACK = ipaddress.IPv4Address("127.0.0.1")


def is_public(address: IPAddress) -> bool:
    """Whether an address belongs to a host on the open internet, looking through IPv6 forms that hold an IPv4 one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.scope_id is not None:
            return False
    if any(address in network for network in _NEVER if network.version == address.version):
        return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified or address.is_loopback
    )


@dataclass(frozen=True)
class AllowRule:
    """One entry of the allow-list: a host name or a network, on one port or (None) on any."""

    host: str
    network: IPNetwork | None
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `name`, `name:port`, `10.0.0.0/8`, `10.0.0.1:8080`, `[fd00::1]:8080`. Raises `ValueError`."""
        host, port = text, None
        if text.startswith("["):
            host, _, rest = text[1:].partition("]")
            if rest:
                port = _port(rest.removeprefix(":"), text)
        elif text.count(":") == 1:
            host, _, digits = text.partition(":")
            port = _port(digits, text)
        try:
            return cls("", ipaddress.ip_network(host), port)
        except ValueError:
            if "/" in host or ":" in host or not host:
                raise ValueError(f"{text!r} is not a host, an address or a network, with an optional port") from None
        return cls(_plain(host), None, port)

    def allows(self, host: str, address: IPAddress, port: int) -> bool:
        if self.port is not None and self.port != port:
            return False
        if self.network is None:
            return self.host == host
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address) in self.network


def _port(digits: str, rule: str) -> int:
    if not digits.isdecimal() or not 0 < int(digits) < 65536:
        raise ValueError(f"{rule!r}: the port must be from 1 to 65535")
    return int(digits)


def _plain(host: str) -> str:
    return host.rstrip(".").lower()


class Resolver(Protocol):
    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """All addresses of a host name. Raises `OSError`: `socket.gaierror` with EAI_NONAME or EAI_NODATA when it has
        none."""
        ...


class SystemResolver:
    async def resolve(self, host: str, port: int) -> Sequence[str]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class EgressPolicy:
    """`allow`: rules in the form of `AllowRule.parse`. `ports`: for public hosts."""

    def __init__(self, *, allow: Iterable[str], ports: Collection[int]) -> None:
        self._allow = tuple(AllowRule.parse(rule) for rule in allow)
        self._ports = frozenset(ports)

    def check(self, host: str, port: int, addresses: Sequence[IPAddress]) -> None:
        """Raises `ForbiddenURL` unless every address may be connected to. It does not say what the name resolves to:
        that would tell a stranger about the inside."""
        for address in addresses:
            if any(rule.allows(_plain(host), address, port) for rule in self._allow):
                continue
            if not is_public(address):
                raise ForbiddenURL("the media address does not lead to a public host")
            if port not in self._ports:
                allowed = ", ".join(str(number) for number in sorted(self._ports))
                raise ForbiddenURL(f"the media address names port {port}; allowed are {allowed}")


class Door:
    """Says which addresses a host may be connected to, for those who make the connection themselves."""

    def __init__(self, policy: EgressPolicy, resolver: Resolver) -> None:
        self._policy = policy
        self._resolver = resolver

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """All of the host's. Raises `ForbiddenURL` when one of them is denied, `InvalidMedia` when there are none,
        `MediaUnavailable` when nobody can say at present."""
        found = await self._resolved(host, port)
        self._policy.check(host, port, found)
        return [str(address) for address in found]

    async def _resolved(self, host: str, port: int) -> list[IPAddress]:
        literal = LOOPBACK if _is_localhost(host) else _literal(host)
        if literal is not None:
            return [literal]
        try:
            found = await self._resolver.resolve(host, port)
        except UnicodeError:
            found = []
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise MediaUnavailable("the host of the media address could not be looked up") from None
            found = []
        if not found:
            raise InvalidMedia("the host of the media address is not known")
        return [ipaddress.ip_address(address) for address in found]


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Makes connections only to addresses that were checked just before."""

    def __init__(self, policy: EgressPolicy, resolver: Resolver) -> None:
        self._door = Door(policy, resolver)
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        async with asyncio.timeout(timeout):
            addresses = await self._door.addresses(host, port)
        failure: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        raise ForbiddenURL("the media address does not lead to a public host")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _is_localhost(host: str) -> bool:
    """RFC 6761 §6.3: these names are never asked for; some resolvers do not know them with a dot at the end."""
    return _plain(host).rpartition(".")[2] == "localhost"


def _literal(host: str) -> IPAddress | None:
    """The address that a host is, in any spelling that some resolver takes: 127.1, 0x7f000001, 017700000001."""
    bare = _plain(host.strip("[]"))
    try:
        return ipaddress.ip_address(bare)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(bare))
    except (OSError, ValueError):
        return None


def _hides_an_address(url: str) -> bool:
    """Whether the host is an IPv4 address in a spelling that is no URL's: octal parts, digits in circles."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return _literal(unicodedata.normalize("NFKC", host)) is not None


def parse_url(url: str) -> httpx.URL:
    """A media address taken apart by the same parser that the request is made with, so that no two readings differ."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        if _hides_an_address(url):
            raise ForbiddenURL("the media address does not lead to a public host") from None
        raise InvalidRequest("the media address is not a valid URL") from None
    if parsed.scheme not in ("http", "https"):
        raise ForbiddenURL("the media address must be http, https or data, or the id of an uploaded file")
    if not parsed.host:
        raise InvalidRequest("the media address names no host")
    if parsed.userinfo:
        raise ForbiddenURL("the media address carries a user name or password, which are not accepted")
    return parsed
