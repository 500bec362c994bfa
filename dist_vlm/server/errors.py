"""What goes wrong with a request, in OpenAI's form."""

from __future__ import annotations

import re
from typing import Any

from dist_vlm.media import PictureError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
# Our messages begin with the place of what is wrong: a field, with its path where it is nested.
_FIELD = re.compile(
    r"([a-z_][a-z0-9_]*)((?:\[\d+\]|\.[a-z_][a-z0-9_]*)*)(?= = | has | have | holds | is | are | must | of type |: )"
)
# What the engine calls a field by another name.
_CLIENTS_NAMES = {
    "inputs": "prompt",
    "multi_modal_data": "messages",
    "prompt_token_ids": "prompt",
    "template_kwargs": "chat_template_kwargs",
}
_PARAM_CHARACTERS = 120
_MESSAGE_CHARACTERS = 290


class ApiError(Exception):
    """Answers a request with a status and OpenAI's error object.

    param: the field to blame. code: a word for programs. retry_after_s: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def api_error(error: ValueError) -> ApiError:
    """The answer to a value that a check of ours refused: its message names the field, the value and what is allowed.

    A picture that could not be fetched is a 422, its code the cause; one that is none is a 400.
    """
    message = str(error)
    named = _FIELD.match(message)
    param = None
    if named is not None:
        param = (_CLIENTS_NAMES.get(named[1], named[1]) + named[2])[:_PARAM_CHARACTERS]
    message = _cut(message)
    cause = getattr(error, "code", None)
    if cause is not None:
        return ApiError(422, message, param=param, code=f"image_{cause}")
    return ApiError(400, message, param=param, code="invalid_image" if isinstance(error, PictureError) else None)


def _cut(message: str) -> str:
    """Without the middle where it is long: it begins with the field and ends with what is allowed."""
    if len(message) <= _MESSAGE_CHARACTERS:
        return message
    half = _MESSAGE_CHARACTERS // 2
    return f"{message[:half]} ... {message[-half:]}"
