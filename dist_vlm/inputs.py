"""The forms in which `LLM.generate` takes a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypeAlias, TypedDict

from PIL import Image

from dist_vlm.multimodal.image import ImageFeatureData, ImagePixelData

ImageInput: TypeAlias = Image.Image | ImagePixelData | ImageFeatureData
MultiModalData: TypeAlias = ImagePixelData | ImageFeatureData | Mapping[str, ImageInput | Sequence[ImageInput]]


class TextPrompt(TypedDict):
    """A prompt in text.

    prompt: the text, with one image placeholder for each image, or as many as the image has tokens.
    multi_modal_data: the image, or {"image": one or a list of them, in the order of their placeholders}.
    cache_salt: only prompts of the same salt share what is cached of their beginning, so that none can find out by
        the time it takes what another one holds; at most 256 characters.
    """

    prompt: str
    multi_modal_data: NotRequired[MultiModalData | None]
    cache_salt: NotRequired[str | None]


class TokensPrompt(TypedDict):
    """A prompt in tokens."""

    prompt_token_ids: list[int]
    multi_modal_data: NotRequired[MultiModalData | None]
    cache_salt: NotRequired[str | None]


class TextTokensPrompt(TypedDict):
    """A prompt in tokens, with the text they came from. The tokens count."""

    prompt: str
    prompt_token_ids: list[int]
    multi_modal_data: NotRequired[MultiModalData | None]
    cache_salt: NotRequired[str | None]


PromptStrictInputs: TypeAlias = str | TextPrompt | TokensPrompt
PromptInputs: TypeAlias = str | TextPrompt | TokensPrompt | TextTokensPrompt

_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "cache_salt")
_MAX_SALT_CHARACTERS = 256


class ParsedPrompt(TypedDict):
    """A prompt of any form, all keys present."""

    prompt: str | None
    prompt_token_ids: list[int] | None
    multi_modal_data: MultiModalData | None
    cache_salt: str


def parse_prompt(inputs: Any) -> ParsedPrompt:
    """Brings one prompt of any accepted form into one. Raises `ValueError` naming what is wrong with it."""
    if isinstance(inputs, str):
        return {"prompt": inputs, "prompt_token_ids": None, "multi_modal_data": None, "cache_salt": ""}
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs of type {type(inputs).__name__}: must be a string or a mapping with {_KEYS}")
    unknown = [key for key in inputs if key not in _KEYS]
    if unknown:
        raise ValueError(f"inputs has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    prompt, tokens = inputs.get("prompt"), inputs.get("prompt_token_ids")
    if prompt is None and tokens is None:
        raise ValueError("inputs has neither prompt nor prompt_token_ids")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt of type {type(prompt).__name__}: must be a string")
    return {
        "prompt": prompt,
        "prompt_token_ids": None if tokens is None else _token_list(tokens),
        "multi_modal_data": inputs.get("multi_modal_data"),
        "cache_salt": _salt(inputs.get("cache_salt")),
    }


def _salt(salt: Any) -> str:
    if salt is None:
        return ""
    if not isinstance(salt, str):
        raise ValueError(f"cache_salt of type {type(salt).__name__}: must be a string")
    if len(salt) > _MAX_SALT_CHARACTERS:
        raise ValueError(f"cache_salt has {len(salt)} characters: must have at most {_MAX_SALT_CHARACTERS}")
    try:
        salt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"cache_salt holds {salt[error.start]!r}, half of a surrogate pair: not text") from None
    return salt


def _token_list(tokens: Any) -> list[int]:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise ValueError(f"prompt_token_ids of type {type(tokens).__name__}: must be a list of integers")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"prompt_token_ids holds {token!r}: must be integers")
    return list(tokens)


def parse_and_batch_prompt(prompt: str | list[str] | list[int] | list[list[int]]) -> list[TextPrompt | TokensPrompt]:
    """Splits OpenAI's `prompt` field, one or many in text or tokens, into single prompts."""
    if isinstance(prompt, str):
        return [TextPrompt(prompt=prompt)]
    if isinstance(prompt, list):
        if not prompt:
            raise ValueError("please provide at least one prompt")
        if all(isinstance(item, str) for item in prompt):
            return [TextPrompt(prompt=item) for item in prompt if isinstance(item, str)]
        if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
            return [TokensPrompt(prompt_token_ids=_token_list(prompt))]
        if all(isinstance(item, list) and item for item in prompt):
            return [TokensPrompt(prompt_token_ids=_token_list(item)) for item in prompt]
    raise ValueError("prompt must be a string, array of strings, array of tokens, or array of token arrays")
