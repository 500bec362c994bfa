"""The URLs that pictures may be fetched from. What is checked here is the very object that is fetched."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

from yarl import URL

from dist_vlm.media.addresses import Address, AllowedAddresses
from dist_vlm.media.fetch_error import FetchError, cut, shown

MAX_URL_CHARACTERS = 8192

# An authority of this form is read alike by every parser.
_AUTHORITY = re.compile(r"(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


class PictureUrls:
    """The rules for URLs: http and https, hosts in `hosts`, literal addresses in `addresses`, nothing ambiguous.

    hosts: names and addresses, "*.example.org" for all names below example.org but not that itself; None for any.
        A host that is listed must still have addresses that `addresses` allows.
    """

    def __init__(self, *, hosts: Sequence[str] | None, addresses: AllowedAddresses) -> None:
        """Raises `ValueError` for a pattern that no host can match."""
        if isinstance(hosts, str):
            raise ValueError(f"allowed_media_hosts={hosts!r}: must be a list of hosts, as ['*.example.org']")
        self._addresses = addresses
        self._hosts = None if hosts is None else {_host_pattern(host) for host in hosts}

    def check(self, text: str) -> URL:
        """The URL to fetch for `text`. Raises `FetchError` (not_allowed)."""
        return self._checked(_parsed(text))

    def check_redirect(self, url: URL, location: str) -> URL:
        """The URL that an answer from `url` redirects to, by the same rules. Raises `FetchError` (not_allowed)."""
        try:
            target = self._checked(url.join(_parsed(location)))
        except FetchError as error:
            raise _not_allowed(f"{shown(url)} redirects to a URL that is refused: {error.problem}") from None
        if url.scheme == "https" and target.scheme != "https":
            raise _not_allowed(f"{shown(url)} redirects from https to http, which is not followed")
        return target

    def _checked(self, url: URL) -> URL:
        if url.scheme not in ("http", "https"):
            raise _not_allowed(f"the URL has the scheme {cut(url.scheme)!r}; only http and https are fetched")
        if not url.raw_authority:
            raise _not_allowed("the URL names no host")
        if "@" in url.raw_authority:
            raise _not_allowed("the URL holds a user name or password, which are not sent")
        authority = _AUTHORITY.fullmatch(url.raw_authority)
        if authority is None or (authority[1] is not None and not 1 <= int(authority[1]) <= 65535):
            raise _not_allowed("the URL must name a host and, if any, a port from 1 to 65535")
        try:
            host = _host(url.raw_host or "")
        except (ValueError, OSError):
            raise _not_allowed("the URL's host is neither a name nor an address") from None
        self._check_host(host)
        return url.with_host(str(host))

    def _check_host(self, host: Address | str) -> None:
        if self._hosts is not None and not _is_listed(str(host), self._hosts):
            raise _not_allowed(f"{cut(str(host))} is not among the hosts that pictures are fetched from")
        if not isinstance(host, str) and not self._addresses.allows(host):
            raise _not_allowed(f"{host} is an address that is neither public nor allowed here")


def _parsed(text: str) -> URL:
    if len(text) > MAX_URL_CHARACTERS:
        raise _not_allowed(f"the URL has {len(text)} characters; at most {MAX_URL_CHARACTERS} are allowed")
    if any(character.isspace() or not character.isprintable() or character == "\\" for character in text):
        raise _not_allowed("the URL holds a backslash, a space or a control character")
    try:
        # One in ASCII is fetched as it is written: quoting it anew could break a signature that it holds.
        return URL(text, encoded=text.isascii())
    except (ValueError, IndexError):  # IndexError: yarl's for http://[]@
        raise _not_allowed("the URL cannot be read") from None


def _host(text: str) -> Address | str:
    """A name in lower case; an address, however it is spelled (127.1, 0x7f000001), as that address.

    Raises `ValueError` or `OSError` for what is neither.
    """
    text = text.lower()
    if ":" in text:
        return IPv6Address(text)
    # A name that ends in a number is an IPv4 address or nothing, as for browsers and for the C library.
    without_root = text.removesuffix(".")
    if _NUMBER.fullmatch(without_root.rpartition(".")[2]):
        return IPv4Address(socket.inet_aton(without_root))
    if len(without_root) > 253 or not _NAME.fullmatch(text):
        raise ValueError(text)
    return text


def _host_pattern(pattern: str) -> str:
    """A host that is allowed, as hosts are compared with it; with a dot before it if it began with "*."."""
    name = pattern.removeprefix("*.").removesuffix(".")
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    try:
        host = _host(URL.build(scheme="http", host=name).raw_host or "")
        if pattern.startswith("*.") and not isinstance(host, str):
            raise ValueError(pattern)
    except (ValueError, OSError):
        problem = "must be a host, as images.example.org or 192.0.2.7, or *.example.org for all below it"
        raise ValueError(f"allowed_media_hosts={pattern!r}: {problem}") from None
    return f".{host}" if pattern.startswith("*.") else str(host)


def _is_listed(host: str, patterns: set[str]) -> bool:
    labels = host.removesuffix(".").split(".")
    suffixes = {"." + ".".join(labels[start:]) for start in range(1, len(labels))}
    return ".".join(labels) in patterns or not suffixes.isdisjoint(patterns)


def _not_allowed(problem: str) -> FetchError:
    return FetchError(problem, code="not_allowed")
