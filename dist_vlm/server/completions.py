"""POST /v1/completions: texts or tokens continued."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from dist_vlm.inputs import TextPrompt, TextTokensPrompt, TokensPrompt, parse_and_batch_prompt, parse_prompt
from dist_vlm.outputs import RequestOutput
from dist_vlm.server.answers import Delta, TokenLogprobs, as_delta, completion_logprobs, usage
from dist_vlm.server.exchange import Exchange, new_heading
from dist_vlm.server.fields import CompletionFields, read_fields
from dist_vlm.server.generating import Arrival
from dist_vlm.server.prompt_log import log_prompt
from dist_vlm.server.sampling import check_streaming, completion_sampling
from dist_vlm.server.services import Services


class CompletionExchange(Exchange):
    """Its choices are numbered through: those of the first prompt, then those of the second."""

    fields: CompletionFields

    def first_chunks(self) -> list[dict[str, Any]]:
        # Characters of each answer sent so far.
        self._sent: dict[tuple[int, int], int] = {}
        return []

    def chunk(self, index: int, delta: Delta, output: RequestOutput) -> dict[str, Any]:
        key = index, delta.index
        choice = self._choice(index, delta, output, begins=key not in self._sent, offset=self._sent.get(key, 0))
        self._sent[key] = self._sent.get(key, 0) + len(choice["text"])
        return {**self.heading.of("text_completion"), "choices": [choice]}

    def usage_chunk(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {**self.heading.of("text_completion"), "choices": [], "usage": usage(outputs)}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [
            self._choice(index, as_delta(answer), output, begins=True, offset=0)
            for index, output in enumerate(outputs)
            for answer in output.outputs
        ]
        return {**self.heading.of("text_completion"), "choices": choices, "usage": usage(outputs)}

    def _choice(self, index: int, delta: Delta, output: RequestOutput, *, begins: bool, offset: int) -> dict[str, Any]:
        echoes = bool(self.fields.echo) and begins
        prompt = self._prompt_text(output) if echoes else ""
        return {
            "index": index * self.params.n + delta.index,
            "text": prompt + delta.text,
            "logprobs": self._logprobs(delta, output if echoes else None, offset),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _logprobs(self, delta: Delta, echoed: RequestOutput | None, offset: int) -> dict[str, Any] | None:
        """echoed: the output whose prompt comes before the delta."""
        if delta.logprobs is None or self.fields.logprobs is None:
            return None
        token_ids, logprobs = list(delta.token_ids), list[TokenLogprobs | None](delta.logprobs)
        if echoed is not None:
            token_ids = [*echoed.prompt_token_ids, *token_ids]
            logprobs = [*(echoed.prompt_logprobs or ()), *logprobs]
        tokens = [(token, self._token_text(token, entries)) for token, entries in zip(token_ids, logprobs, strict=True)]
        return completion_logprobs(tokens, logprobs, num_alternatives=self.fields.logprobs, offset=offset)

    def _token_text(self, token: int, entries: TokenLogprobs | None) -> str:
        if entries is None:
            text: str = self._services.llm.get_tokenizer().decode([token])
            return text
        return entries[token].decoded_token or ""

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        text: str = self._services.llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=True)
        return text


async def read_completion(body: dict[str, Any], arrival: Arrival) -> CompletionExchange:
    """Checks a body. Raises `ApiError` or `ValueError`."""
    services = arrival.services
    fields = read_fields(CompletionFields, body)
    services.check_model(fields.model)
    check_streaming(fields)
    params = completion_sampling(fields)
    if isinstance(fields.prompt, list):
        services.check_text("prompt", len(fields.prompt), what="entries")
    prompts = parse_and_batch_prompt(fields.prompt)
    arrival.seat.grow(len(prompts) * (params.best_of or 1))
    # All are checked before one of them is answered: a stream that has begun cannot be refused.
    inputs = [await services.in_thread(partial(_checked, prompt, fields, services)) for prompt in prompts]
    for prompt in prompts:
        log_prompt(services.config, arrival.request_id, parse_prompt(prompt)["prompt"])
    return CompletionExchange(
        services,
        heading=new_heading("cmpl", arrival.request_id, services.model),
        fields=fields.model_copy(update={"prompt": ""}),
        prompts=inputs,
        params=params,
        arrival_time=arrival.time,
    )


def _checked(
    prompt: TextPrompt | TokensPrompt, fields: CompletionFields, services: Services
) -> TextTokensPrompt | TokensPrompt:
    """The prompt with its tokens. Raises `ValueError`."""
    parsed = parse_prompt(prompt)
    text, given = parsed["prompt"], parsed["prompt_token_ids"]
    services.check_text("prompt", len(text or ()))
    services.check_text("prompt", len(given or ()), what="tokens")
    processor = services.llm.front.processor
    token_ids = processor.text_tokens(text, given, keep=fields.truncate_prompt_tokens)
    if text is None:
        return TokensPrompt(prompt_token_ids=token_ids, cache_salt=fields.cache_salt)
    return TextTokensPrompt(prompt=text, prompt_token_ids=token_ids, cache_salt=fields.cache_salt)
