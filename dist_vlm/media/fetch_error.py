"""Why a picture could not be fetched, in our own words: what a library says may quote secrets, and goes to the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Self

import aiohttp
from yarl import URL

from dist_vlm.media.picture import PictureError

_log = logging.getLogger(__name__)

Code = Literal["not_allowed", "dns", "tls", "timeout", "refused", "status", "redirects", "too_large", "not_an_image"]
MAX_SHOWN = 80

# OpenSSL's X509_V_ERR numbers that a client can tell the picture's owner about.
_CERTIFICATE_PROBLEMS = {
    9: "is not valid yet",
    10: "has expired",
    18: "is signed by itself alone",
    62: "is for another host",
    64: "is for another address",
}


class FetchError(PictureError):
    """A picture that could not be fetched; `code` says why.

    is_passing: the fault may be gone in a moment, so that another try is worth it.
    """

    def __init__(self, problem: str, *, code: Code, name: str = "the picture", is_passing: bool = False) -> None:
        super().__init__(f"{name}: {problem}")
        self.problem = problem
        self.code = code
        self.is_passing = is_passing

    def called(self, name: str) -> Self:
        """The same error about the picture that the client knows as `name`."""
        return type(self)(self.problem, code=self.code, name=name, is_passing=self.is_passing)


def shown(url: URL) -> str:
    """What messages tell of a checked URL: scheme, host and port, at most 80 characters."""
    return cut(f"{url.scheme}://{url.host_port_subcomponent}")


def cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


@contextmanager
def library_faults(url: URL) -> Iterator[None]:
    """Turns what aiohttp raises while it talks to the host of `url` into `FetchError`."""
    try:
        yield
    except aiohttp.ClientError as error:
        _log.debug("fetching from %s failed", shown(url), exc_info=True)
        raise _in_our_words(error, shown(url)) from None


def _in_our_words(error: aiohttp.ClientError, where: str) -> FetchError:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        number = getattr(error.certificate_error, "verify_code", 0)
        problem = _CERTIFICATE_PROBLEMS.get(number, "is not signed by an authority that is trusted here")
        return FetchError(f"the TLS certificate of {where} {problem}", code="tls")
    if isinstance(error, aiohttp.ClientSSLError):
        return FetchError(f"no TLS connection to {where} came about", code="tls")
    if isinstance(error, aiohttp.ClientConnectorError):
        return FetchError(f"no connection to {where} came about", code="refused", is_passing=True)
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("the URL is not one that can be fetched", code="not_allowed")
    if isinstance(error, aiohttp.ClientResponseError):
        return FetchError(f"{where} does not answer as a web server does", code="refused")
    return FetchError(f"{where} broke the connection off", code="refused", is_passing=True)
