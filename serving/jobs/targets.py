"""Which addresses the service may call because a client asked it to: none inside its own network, unless it is told so.

A name is resolved once, each address that it stands for is looked at, and the call goes to the very address that was
looked at: a name that stands for something else a moment later changes nothing (OWASP, SSRF prevention).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

_MAX_URL_CHARACTERS = 2048
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class BadTarget(ValueError):  # noqa: N818
    """The service won't call this; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """`url` is to be called at `address`."""

    url: str
    host: str
    port: int
    scheme: str
    address: str


def check_url(url: str, *, allow_private: bool) -> SplitResult:
    """What can be said without resolving a name. Raises `BadTarget`."""
    if len(url) > _MAX_URL_CHARACTERS:
        raise BadTarget(f"it has more than {_MAX_URL_CHARACTERS} characters")
    if any(character.isspace() or not character.isprintable() for character in url):
        raise BadTarget("it has spaces or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadTarget(str(error)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadTarget("it must start with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise BadTarget("it must not hold a user name or a password")
    if port == 0:
        raise BadTarget("port 0 can't be called")
    try:
        literal = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return parts
    _check_address(literal, allow_private)
    return parts


async def resolve(url: str, *, allow_private: bool) -> Target:
    """Where to call it. Raises `BadTarget`, or `OSError` when the name can't be resolved now."""
    parts = check_url(url, allow_private=allow_private)
    host = parts.hostname
    assert host is not None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        _check_address(address, allow_private)
    return Target(url, host, port, parts.scheme, str(addresses[0]))


def _check_address(address: Address, allow_private: bool) -> None:
    inside = _inside(address)
    if inside.is_multicast or inside.is_unspecified:
        raise BadTarget(f"{address} is nobody's address")
    if not allow_private and not inside.is_global:
        raise BadTarget(f"{address} is not a public address")


def _inside(address: Address) -> Address:
    """The IPv4 address that an IPv6 address may stand for."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address
