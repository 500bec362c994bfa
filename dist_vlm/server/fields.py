"""The bodies of requests: their fields and types. Ranges are checked where they are used, once for every way in."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from dist_vlm.config_fields import nearest
from dist_vlm.server.errors import ApiError

# OpenAI's own defaults; the others are those of `SamplingParams`.
CHAT_TEMPERATURE = 0.7
COMPLETION_MAX_TOKENS = 16


class Fields(BaseModel):
    """A body whose unknown fields are errors, and in which a string is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Fields):
    include_usage: bool | None = Field(None, description="send the usage in a chunk of its own at the end")


class SamplingFields(Fields):
    """What chat and completion requests have in common."""

    model: str | None = Field(None, description="the served model's name")
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="token id -> number in [-100, 100]")
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    echo: bool | None = Field(None, description="begin the answer with the prompt, or with the last message")
    user: str | None = Field(None, description="has no effect")
    cache_salt: str | None = Field(None, description="only requests of the same salt share cached prompts")


class ChatFields(SamplingFields):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(
        description="role and content: a text, or a list of parts of type text or image_url", min_length=1
    )
    temperature: float | None = Field(None, description=f"{CHAT_TEMPERATURE} where it is absent")
    max_tokens: int | None = Field(None, description="as much as the model's length allows where it is absent")
    max_completion_tokens: int | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = Field(None, description="handed to the chat template")
    tool_choice: str | None = Field(None, description="none or auto: whether a tool is called is the model's to say")
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = Field(None, description="false: the template decides")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="more names for the chat template")


class CompletionFields(SamplingFields):
    """POST /v1/completions."""

    prompt: str | list[Any] = Field(description="one text or list of token ids, or a list of several")
    max_tokens: int | None = Field(None, description=f"{COMPLETION_MAX_TOKENS} where it is absent")
    logprobs: int | None = None
    truncate_prompt_tokens: int | None = None


class TokenizeFields(Fields):
    """POST /tokenize: a prompt, or messages as for a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeFields(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


_LATER = "not served yet"
_TEMPLATE = "templates come from the operator: dist-vlm serve --chat-template"
_BEAMS = "beam search is not served; use best_of with a temperature above 0, or temperature 0"
_GUIDED = "guided decoding is not served; ask for the form in the prompt"
_TOOLS = "functions are not served; use tools"

# Fields of OpenAI's or vLLM's API that are not served: the values that ask for nothing, and what to do instead.
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), _LATER),
    "chat_template": ((), _TEMPLATE),
    "documents": (([],), "write documents into the messages"),
    "early_stopping": ((False,), _BEAMS),
    "function_call": (("none",), _TOOLS),
    "functions": (([],), _TOOLS),
    "guided_choice": ((), _GUIDED),
    "guided_decoding_backend": ((), _GUIDED),
    "guided_grammar": ((), _GUIDED),
    "guided_json": ((), _GUIDED),
    "guided_regex": ((), _GUIDED),
    "guided_whitespace_pattern": ((), _GUIDED),
    "length_penalty": ((1, 1.0), _BEAMS),
    "modalities": ((["text"],), "answers are text"),
    "parallel_tool_calls": ((True,), "calls of tools are the model's to write"),
    "prediction": ((), _LATER),
    "response_format": (({"type": "text"},), "answers are free text; ask for the form in the prompt"),
    "suffix": (("",), "text cannot be put between two others"),
    "use_beam_search": ((False,), _BEAMS),
    "web_search_options": ((), _LATER),
}

_WORDS = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing_size": "must be a smaller integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_unicode": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "too_short": "must have at least one entry",
}
# Fields that are one of several types, of which pydantic names each.
_UNIONS = {
    "prompt": "must be a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "must be a string or a list of strings",
}
# pydantic looks at every entry, and has an error for each that is wrong.
_MOST_ENTRIES = 10_000
_LONG_LISTS = ("prompt", "tokens")

Body = TypeVar("Body", bound=Fields)


def read_fields(kind: type[Body], body: dict[str, Any]) -> Body:
    """The fields of a body. Raises a 400 naming one that is not served, unknown, missing or of a wrong type."""
    given = {}
    for name, value in body.items():
        if name in REFUSED:
            _check_refused(name, value)
        elif name not in kind.model_fields:
            raise _unknown(name, name, kind)
        else:
            _check_count(name, value)
            given[name] = value
    choice = given.get("tool_choice")
    if choice is not None and choice not in ("none", "auto"):
        raise _unserved("tool_choice", choice, "no call can be forced; allowed are 'none' and 'auto'")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from None


def _check_refused(name: str, value: Any) -> None:
    accepted, instead = REFUSED[name]
    if value is not None and not any(type(value) is type(one) and value == one for one in accepted):
        raise _unserved(name, value, instead)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, (list, dict)) and len(value) > _MOST_ENTRIES and name not in _LONG_LISTS:
        text = f"{name} has {len(value)} entries: must have at most {_MOST_ENTRIES}"
        raise ApiError(400, text, param=name, code=None)


def _unserved(name: str, value: Any, instead: str) -> ApiError:
    return ApiError(400, f"{name} = {short(value)}: is not served: {instead}", param=name, code="unsupported_parameter")


def _unknown(name: str, path: str, kind: type[Fields]) -> ApiError:
    text = f"{short(name)} is no field of this request{nearest(_clean(name), kind.model_fields)}"
    return ApiError(400, text, param=_clean(path), code="unknown_field")


def _explained(error: ValidationError) -> ApiError:
    """Names the first field that is wrong, and in it the deepest place: of a union's errors, the one that fits best."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]["loc"][0]
    problem = max((one for one in problems if one["loc"][0] == first), key=lambda one: len(_path(one["loc"])))
    path = _path(problem["loc"])
    param = path[0] + "".join(f"[{part}]" if isinstance(part, int) else f".{_clean(part)}" for part in path[1:])
    if problem["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_field")
    if problem["type"] == "extra_forbidden":
        return _unknown(path[-1], param, StreamOptions)
    allowed = _WORDS.get(problem["type"], "is not of the type that /openapi.json gives")
    if len(path) == 1 < len(problem["loc"]):
        allowed = _UNIONS.get(path[0], allowed)
    return ApiError(400, f"{param} = {short(problem['input'])}: {allowed}", param=param, code=None)


def _path(location: tuple[int | str, ...]) -> list[Any]:
    """Where in the body; pydantic adds the name of a union's member."""
    name, *rest = location
    return [name, *(rest[1:] if name in _UNIONS else rest)]


def _clean(name: str) -> str:
    """A name from a body as it may stand in an answer: no longer than is read, and text."""
    return name[:80].encode("utf-8", "replace").decode()


class _Short(reprlib.Repr):
    """Of a long value not more is looked at than is shown."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Without sorting it."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_SHORT = _Short()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxdict = 4
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40
_SHOWN_CHARACTERS = 200


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = _SHORT.repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
