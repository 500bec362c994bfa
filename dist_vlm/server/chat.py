"""POST /v1/chat/completions: a conversation, with pictures, continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from dist_vlm.engine.chat import ChatOptions
from dist_vlm.engine.chat_content import Message, parse_messages
from dist_vlm.engine.images import PreparedImage
from dist_vlm.inputs import MultiModalData, TextTokensPrompt
from dist_vlm.outputs import RequestOutput
from dist_vlm.server.answers import Delta, as_delta, chat_logprobs, usage
from dist_vlm.server.exchange import Exchange, new_heading
from dist_vlm.server.fields import ChatFields, read_fields
from dist_vlm.server.generating import Arrival
from dist_vlm.server.prompt_log import log_prompt
from dist_vlm.server.sampling import chat_sampling, check_streaming
from dist_vlm.server.services import Services


class ChatExchange(Exchange):
    """echo: text that the answers begin with. role: theirs."""

    fields: ChatFields
    echo: str = ""
    role: str = "assistant"

    def first_chunks(self) -> list[dict[str, Any]]:
        delta = {"role": self.role, "content": self.echo}
        chunks = [self._chunk([_choice(index, "delta", delta, logprobs=None)]) for index in range(self.params.n)]
        if self.tells_usage:
            for chunk in chunks:
                chunk["usage"] = None
        return chunks

    def chunk(self, index: int, delta: Delta, output: RequestOutput) -> dict[str, Any]:
        return self._chunk([self._choice_of("delta", {"content": delta.text}, delta)])

    def usage_chunk(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage(outputs)}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for answer in outputs[0].outputs:
            delta = as_delta(answer)
            message = {"role": self.role, "content": self.echo + delta.text}
            choices.append(self._choice_of("message", message, delta))
        return {**self.heading.of("chat.completion"), "choices": choices, "usage": usage(outputs)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.heading.of("chat.completion.chunk"), "choices": choices}

    def _choice_of(self, key: str, content: dict[str, Any], delta: Delta) -> dict[str, Any]:
        logprobs = chat_logprobs(delta, self.fields.top_logprobs or 0)
        return {
            **_choice(delta.index, key, content, logprobs=logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


async def read_chat(body: dict[str, Any], arrival: Arrival) -> ChatExchange:
    """Checks a body, renders its conversation and readies its pictures. Raises `ApiError` or `ValueError`."""
    services = arrival.services
    fields = read_fields(ChatFields, body)
    services.check_model(fields.model)
    check_streaming(fields)
    params = chat_sampling(fields)
    most = services.llm.config.scheduler.max_logprobs
    if fields.top_logprobs is not None and fields.top_logprobs > most:
        raise ValueError(f"top_logprobs = {fields.top_logprobs}: must be at most max_logprobs = {most}")
    arrival.seat.grow(params.best_of or 1)
    if fields.add_special_tokens:
        raise ValueError("add_special_tokens = True: must be false, the chat template writes them")
    # Not in the event loop: there may be thousands of parts.
    fetches = services.pictures.fetches
    conversation = await services.in_thread(lambda: parse_messages(fields.messages, fetches=fetches))
    _check_number(conversation, services)
    prompt, token_ids = await services.render(conversation, chat_options(fields))
    heading = new_heading("chatcmpl", arrival.request_id, services.model)
    log_prompt(services.config, arrival.request_id, prompt)
    images = await _images(conversation, token_ids, arrival)
    # A picture that is ready is one form of picture to the engine, if none that a caller of the library has.
    data = cast(MultiModalData, {"image": images})
    inputs = TextTokensPrompt(
        prompt=prompt, prompt_token_ids=token_ids, multi_modal_data=data, cache_salt=fields.cache_salt
    )
    exchange = ChatExchange(
        services,
        heading=heading,
        fields=fields.model_copy(update={"messages": []}),
        prompts=[inputs],
        params=params,
        arrival_time=arrival.time,
    )
    last = conversation[-1]
    continues = fields.add_generation_prompt is False
    exchange.role = last.fields["role"] if continues else services.config.response_role
    if fields.echo and last.fields["role"] == exchange.role:
        exchange.echo = "\n".join(last.content_texts)
    return exchange


def chat_options(fields: Any) -> ChatOptions:
    """How a conversation is rendered. fields: those of a chat, or of /tokenize."""
    return ChatOptions(
        add_generation_prompt=fields.add_generation_prompt is not False,
        tools=fields.tools,
        template_kwargs=fields.chat_template_kwargs,
    )


def _check_number(conversation: Sequence[Message], services: Services) -> None:
    """Before anything is rendered."""
    number = sum(len(message.pictures) for message in conversation)
    limit = services.llm.config.vision.max_images_per_prompt
    if number > limit:
        raise ValueError(f"messages have {number} pictures: must have at most {limit}")


async def _images(conversation: Sequence[Message], token_ids: list[int], arrival: Arrival) -> list[PreparedImage]:
    """The pictures, ready, in their share of the memory, which they keep until the request has ended."""
    services = arrival.services
    pictures = [picture for message in conversation for picture in message.pictures]
    # Before anything is fetched or decoded.
    services.llm.front.processor.check_size(token_ids, len(pictures))
    if not pictures:
        return []
    await arrival.held.enter_async_context(services.arrays.share(len(pictures) * services.image_bytes))
    return await services.pictures.prepare(pictures)


def _choice(index: int, key: str, content: dict[str, Any], *, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, key: content, "logprobs": logprobs, "finish_reason": None}
