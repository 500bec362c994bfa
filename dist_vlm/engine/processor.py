"""From a prompt and its images to a request in the engine's terms. Everything a client may get wrong ends here."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dist_vlm.engine.images import ImagePreparer, PreparedImage
from dist_vlm.engine.messages import EngineImage, EngineRequest
from dist_vlm.engine.sampling_rows import SamplingRows
from dist_vlm.inputs import parse_prompt
from dist_vlm.sampling import SamplingParams
from dist_vlm.workers.plan import ImageSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dist_vlm.workers.models import ModelSpec


# Priorities cross to the engine as whole numbers of 32 bits.
_PRIORITIES = range(-(2**31), 2**31)


@dataclass(frozen=True, slots=True)
class ProcessedPrompt:
    """A checked request, and the text it came from where there was one.

    requests: one for each answer, best_of of them. A single one has the request's id, several have "id/0", "id/1", ...
    """

    request_id: str
    prompt: str | None
    requests: tuple[EngineRequest, ...]


class Processor:
    """Tokenizes, expands image placeholders, and checks every quantity that a step would otherwise trust."""

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        spec: ModelSpec,
        images: ImagePreparer,
        max_model_len: int,
        seed: int,
        max_logprobs: int = 20,
        serves_logits_processors: bool = False,
    ) -> None:
        # A first use sets it to cut off and pad nothing. From here on threads only read it.
        tokenizer.encode("a")
        self._tokenizer = tokenizer
        self._spec = spec
        self._images = images
        self._max_model_len = max_model_len
        self._sampling = SamplingRows(
            tokenizer=tokenizer,
            spec=spec,
            seed=seed,
            max_logprobs=max_logprobs,
            serves_logits_processors=serves_logits_processors,
        )

    def process(
        self,
        request_id: str,
        inputs: Any,
        params: SamplingParams,
        *,
        priority: int = 0,
        helpers: Executor | None = None,
    ) -> ProcessedPrompt:
        """Raises `ValueError` naming the field, its value and what is allowed.

        helpers: threads that may take parts of the work on pictures, as `run_beside` says.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params of type {type(params).__name__}: must be a SamplingParams")
        _check_priority(priority)
        # Checked anew: its fields may have been changed since it was made.
        params = params.clone()
        self._sampling.check(params)
        parsed = parse_prompt(inputs)
        token_ids = self._tokenize(parsed["prompt"], parsed["prompt_token_ids"])
        # Counts and length are known before any picture is decoded.
        given = self._images.listed(parsed["multi_modal_data"])
        token_ids, starts = self._expand(token_ids, len(given))
        token_ids, starts = _truncate(token_ids, starts, params.truncate_prompt_tokens)
        self._check_length(len(token_ids))
        images = self._images.prepare(given, helpers=helpers)
        spans = [self._span(image, start) for image, start in zip(images, starts, strict=True)]
        max_tokens, stop_token_ids = self._max_tokens(params, len(token_ids)), self._stop_token_ids(params)
        rows = self._sampling.rows(params, name=request_id, max_tokens=max_tokens, stop_token_ids=stop_token_ids)
        first = EngineRequest(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            images=tuple(EngineImage(span, image.kind, image.array) for span, image in zip(spans, images, strict=True)),
            sampling=rows[0],
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            priority=priority,
            cache_salt=parsed["cache_salt"],
        )
        requests: tuple[EngineRequest, ...] = (first,)
        if len(rows) > 1:
            requests = tuple(
                replace(first, request_id=f"{request_id}/{row.sample_index}", sampling=row) for row in rows
            )
        return ProcessedPrompt(request_id, parsed["prompt"], requests)

    def check_size(self, token_ids: list[int], num_images: int) -> None:
        """Checks a prompt before its pictures are there: their number, their placeholders, the length with them.
        Raises `ValueError`."""
        self._images.listed({"image": [None] * num_images})
        expanded, _ = self._expand(token_ids, num_images)
        self._check_length(len(expanded))

    def text_tokens(self, prompt: str | None, token_ids: list[int] | None, *, keep: int | None) -> list[int]:
        """All tokens of a prompt without pictures, once it is checked as `process` does. keep: how many of the last
        are to be kept (`truncate_prompt_tokens`). Raises `ValueError`."""
        token_ids = self._tokenize(prompt, token_ids)
        expanded, starts = self._expand(token_ids, 0)
        kept, _ = _truncate(expanded, starts, keep)
        self._check_length(len(kept))
        return token_ids

    def _tokenize(self, prompt: str | None, token_ids: list[int] | None) -> list[int]:
        if token_ids is None:
            if not prompt:
                raise ValueError("prompt is empty; it must have at least one character")
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"prompt holds {prompt[error.start]!r}, half of a surrogate pair: not text") from None
            token_ids = self._tokenizer.encode(prompt)
        if not token_ids:
            raise ValueError("prompt_token_ids is empty; it must have at least one token")
        for token in token_ids:
            if not 0 <= token < self._spec.vocab_size:
                raise ValueError(f"prompt_token_ids holds {token}: must be in 0 .. {self._spec.vocab_size - 1}")
        return token_ids

    def _expand(self, token_ids: list[int], num_images: int) -> tuple[list[int], list[int]]:
        """Gives each image its run of placeholder tokens, whether the prompt has one for it or the whole run;
        returns the tokens and where the runs start."""
        placeholder, size = self._spec.image_token_id, self._spec.image_feature_size
        if placeholder is None or size is None:
            return token_ids, []
        found = token_ids.count(placeholder)
        if found == num_images:
            expanded: list[int] = []
            for token in token_ids:
                expanded.extend([placeholder] * size if token == placeholder else [token])
            token_ids = expanded
        elif found != num_images * size:
            raise ValueError(_placeholder_message(found, num_images, size))
        positions = [position for position, token in enumerate(token_ids) if token == placeholder]
        for index in range(num_images):
            run = positions[index * size : (index + 1) * size]
            if run[-1] - run[0] != size - 1:
                raise ValueError(f"the {size} placeholders of image {index} do not stand together in the prompt")
        return token_ids, positions[::size]

    def _span(self, image: PreparedImage, start: int) -> ImageSpan:
        assert self._spec.image_feature_size is not None
        return ImageSpan(image.key, start, self._spec.image_feature_size)

    def _check_length(self, num_tokens: int) -> None:
        longest = self._max_model_len - 1
        if num_tokens > longest:
            raise ValueError(
                f"the prompt is {num_tokens} tokens long, images included; at most {longest} are allowed "
                f"(max_model_len = {self._max_model_len}, and one token to generate)"
            )

    def _max_tokens(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        room = self._max_model_len - num_prompt_tokens
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        assert params.stop_token_ids is not None
        eos = () if params.ignore_eos else self._spec.eos_token_ids
        return frozenset((*params.stop_token_ids, *eos))


def _truncate(token_ids: list[int], starts: list[int], keep: int | None) -> tuple[list[int], list[int]]:
    """The last `keep` tokens, and where the images' runs now start. Images must stay whole."""
    cut = len(token_ids) - keep if keep is not None else 0
    if cut <= 0:
        return token_ids, starts
    if starts and starts[0] < cut:
        raise ValueError(
            f"truncate_prompt_tokens = {keep}: would cut off image 0, whose placeholders begin at token {starts[0]} of "
            f"the prompt's {len(token_ids)}; must be at least {len(token_ids) - starts[0]}"
        )
    return token_ids[cut:], [start - cut for start in starts]


def _check_priority(priority: Any) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int) or priority not in _PRIORITIES:
        allowed = f"an integer, at least {_PRIORITIES.start} and at most {_PRIORITIES.stop - 1}; lower runs first"
        raise ValueError(f"priority = {priority!r}: must be {allowed}")


def _placeholder_message(found: int, num_images: int, size: int) -> str:
    if num_images == 0:
        return f"the prompt has {found} image placeholders, but multi_modal_data has no image"
    return (
        f"the prompt has {found} image placeholders for {num_images} image(s); "
        f"must be one an image ({num_images}) or image_feature_size an image ({num_images * size})"
    )
