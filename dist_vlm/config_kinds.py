"""The kinds of value that configuration fields hold: how each is described, checked, and read from a command line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SEGMENT = r"[A-Za-z0-9._~!$&'()*+,;=:@%-]+"
_PATH_PREFIX = re.compile(f"(?:/(?!\\.{{1,2}}(?:/|$)){_SEGMENT})*")


class NotOfKindError(ValueError):
    """A value is not of its kind. The text is what else is to be said about it, mostly nothing."""


def _never(value: Any) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Kind:
    """allowed: what follows "must be". check: the value in its kept form, or `NotOfKindError`. parse: a command line's
    text in a form for `check`, or `ValueError`. metavar: its place in a help text.

    names_path: whether a value is the path of a file or directory, so that one that begins with a dot is relative to
    the YAML file that holds it. is_secret: a value is never shown.
    """

    allowed: str
    check: Callable[[Any], Any]
    parse: Callable[[str], Any] = str
    metavar: str = "TEXT"
    names_path: Callable[[Any], bool] = _never
    is_secret: bool = False


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise NotOfKindError
    return value


def _finite_float(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise NotOfKindError
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NotOfKindError("finite")
    return number


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise NotOfKindError
    return value


def _parse_bool(text: str) -> bool:
    lowered = text.lower()
    if lowered not in ("true", "false"):
        raise ValueError(text)
    return lowered == "true"


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise NotOfKindError
    if not value.strip() or "\0" in value:
        raise NotOfKindError("not empty and without NUL")
    return value


def _path(value: Any) -> str:
    return _string(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _is_no_template(value: str | None) -> bool:
    return value is not None and "{" not in value


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        try:
            value = [int(part) for part in value.split(",")]
        except ValueError:
            raise NotOfKindError from None
    whole = isinstance(value, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    if not whole or len(value) != 4 or min(value) < 1:
        raise NotOfKindError("each at least 1")
    return tuple(value)


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise NotOfKindError
    return tuple(_string(one) for one in value)


def _parse_strings(text: str) -> Any:
    """A JSON list, or strings between commas."""
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",")]
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(text) from None


def _path_prefix(value: Any) -> str:
    if not isinstance(value, str) or not _PATH_PREFIX.fullmatch(value):
        raise NotOfKindError
    return value


def _key(value: Any) -> str:
    """Clients send it in a header."""
    if not isinstance(value, str) or not value or not all("!" <= character <= "~" for character in value):
        raise NotOfKindError
    return value


KINDS: dict[str, Kind] = {
    "int": Kind(allowed="an integer", check=_integer, parse=int, metavar="N"),
    "float": Kind(allowed="a number", check=_finite_float, parse=float, metavar="X"),
    "bool": Kind(allowed="true or false", check=_bool, parse=_parse_bool),
    "str": Kind(allowed="a string", check=_string),
    "shape": Kind(allowed="four integers, such as 1,3,336,336", check=_shape, metavar="N,C,H,W"),
    "strings": Kind(
        allowed='a list of strings, such as ["a", "b"]', check=_strings, parse=_parse_strings, metavar="LIST"
    ),
    "path_prefix": Kind(
        allowed="empty, or a path such as /models/one, without a slash at its end", check=_path_prefix, metavar="PATH"
    ),
    "directory": Kind(allowed="a string", check=_path, metavar="DIR", names_path=bool),
    "file": Kind(allowed="a string", check=_path, metavar="FILE", names_path=bool),
    "template": Kind(allowed="a string", check=_path, metavar="FILE", names_path=_is_no_template),
    "key": Kind(
        allowed="a string of visible ASCII characters, without spaces", check=_key, metavar="KEY", is_secret=True
    ),
}
