"""From a prompt and its images to a request in the engine's terms. Everything a client may get wrong ends here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.engine.images import ImagePreparer, PreparedImage
from dist_vlm.engine.messages import EngineImage, EngineRequest
from dist_vlm.inputs import parse_prompt
from dist_vlm.sampling import SamplingParams, refuse_unserved
from dist_vlm.workers.plan import ImageSpan, SamplingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dist_vlm.workers.models import ModelSpec


@dataclass(frozen=True, slots=True)
class ProcessedPrompt:
    """A checked request, and the text it came from where there was one."""

    prompt: str | None
    request: EngineRequest


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
    ) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._images = images
        self._max_model_len = max_model_len
        self._seed = seed
        self._num_seeded = 0

    def process(self, request_id: str, inputs: Any, params: SamplingParams) -> ProcessedPrompt:
        """Raises `ValueError` naming the field, its value and what is allowed."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params of type {type(params).__name__}: must be a SamplingParams")
        # Checked anew: its fields may have been changed since it was made.
        params = params.clone()
        refuse_unserved(params)
        parsed = parse_prompt(inputs)
        token_ids = self._tokenize(parsed["prompt"], parsed["prompt_token_ids"])
        # Counts and length are known before any picture is decoded.
        given = self._images.listed(parsed["multi_modal_data"])
        token_ids, starts = self._expand(token_ids, len(given))
        self._check_length(len(token_ids))
        images = self._images.prepare(given)
        spans = [self._span(image, start) for image, start in zip(images, starts, strict=True)]
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            images=tuple(EngineImage(span, image.kind, image.array) for span, image in zip(spans, images, strict=True)),
            sampling=self._sampling_row(params),
            max_tokens=self._max_tokens(params, len(token_ids)),
            stop_token_ids=self._stop_token_ids(params),
        )
        return ProcessedPrompt(parsed["prompt"], request)

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

    def _sampling_row(self, params: SamplingParams) -> SamplingRow:
        if params.is_greedy:
            return SamplingRow()
        return SamplingRow(
            temperature=float(params.temperature),
            top_k=min(max(0, params.top_k), self._spec.vocab_size),
            top_p=float(params.top_p),
            seed=params.seed if params.seed is not None else self._next_seed(),
        )

    def _next_seed(self) -> int:
        """A seed for a request that names none: the same run of the same engine draws the same."""
        self._num_seeded += 1
        digest = hashlib.blake2b(f"{self._seed} {self._num_seeded}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _placeholder_message(found: int, num_images: int, size: int) -> str:
    if num_images == 0:
        return f"the prompt has {found} image placeholders, but multi_modal_data has no image"
    return (
        f"the prompt has {found} image placeholders for {num_images} image(s); "
        f"must be one an image ({num_images}) or image_feature_size an image ({num_images * size})"
    )
