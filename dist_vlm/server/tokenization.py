"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from dist_vlm.engine.chat_content import parse_messages
from dist_vlm.server.chat import chat_options
from dist_vlm.server.fields import DetokenizeFields, TokenizeFields, read_fields, short
from dist_vlm.server.services import Services


async def tokenize(body: dict[str, Any], services: Services) -> dict[str, Any]:
    """The tokens that the engine would be given: those of messages with one placeholder for each picture, which is
    neither fetched nor decoded. Raises `ApiError` or `ValueError`."""
    fields = read_fields(TokenizeFields, body)
    services.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise ValueError("prompt and messages: exactly one of them must be given")
    if fields.messages is not None:
        if fields.add_special_tokens:
            raise ValueError("add_special_tokens = True: must be false, the chat template writes them")
        messages = fields.messages
        conversation = await services.in_thread(lambda: parse_messages(messages, fetches=True))
        _, token_ids = await services.render(conversation, chat_options(fields))
    else:
        prompt, adds = fields.prompt or "", fields.add_special_tokens is not False
        services.check_text("prompt", len(prompt))
        _check_encodable(prompt)
        tokenizer = services.llm.get_tokenizer()
        token_ids = await services.in_thread(lambda: tokenizer.encode(prompt, add_special_tokens=adds))
    return {"count": len(token_ids), "max_model_len": services.max_model_len, "tokens": token_ids}


def _check_encodable(prompt: str) -> None:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt holds {prompt[error.start]!r}, half of a surrogate pair: not text") from None


async def detokenize(body: dict[str, Any], services: Services) -> dict[str, Any]:
    """The text of tokens, special ones included. Raises `ApiError` or `ValueError`."""
    fields = read_fields(DetokenizeFields, body)
    services.check_model(fields.model)
    services.check_text("tokens", len(fields.tokens), what="entries")
    vocab_size = services.llm.front.spec.vocab_size
    for token in fields.tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"tokens holds {short(token)}: must be in 0 .. {vocab_size - 1}")
    tokenizer = services.llm.get_tokenizer()
    text = await services.in_thread(lambda: tokenizer.decode(fields.tokens))
    return {"prompt": text}
