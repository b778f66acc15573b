"""Where servers may be: what makes an address acceptable, and the key that goes with one beyond loopback."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection
from urllib.parse import urlsplit


def address_problem(url: str, hosts: Collection[str] | None = None) -> str | None:
    """What is wrong with a server's address, as the end of a sentence; None for a good one.

    Good is `http(s)://host:port` and nothing more. With `hosts` the host must be one of them.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{error}; give http://host:port"
    if parts.scheme not in ("http", "https"):
        return f"the scheme is {parts.scheme or 'missing'!r}; allowed: http, https"
    if not parts.hostname or port is None or not 0 < port < 65536:
        return "give http://host:port"
    if parts.username or parts.password or parts.path.strip("/") or parts.query or parts.fragment:
        return "only http://host:port is allowed, without user, path or query"
    if hosts is not None and parts.hostname not in hosts:
        return f"host {parts.hostname!r} is not among servers.hosts ({', '.join(hosts)})"
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def api_key(variable: str) -> str | None:
    """The servers' API key; None when the variable is not set or empty."""
    return os.environ.get(variable) or None


def key_problem(host: str, variable: str) -> str | None:
    """A sentence when `host` can be reached from elsewhere and no API key protects it."""
    if is_loopback(host) or api_key(variable):
        return None
    return (
        f"a server on {host} can be reached from other machines and would take weights from anyone: "
        f"put an API key into the environment variable {variable} (servers.api_key_env), or use 127.0.0.1"
    )
