"""One generating request that has been read and checked: what chat and completions have in common."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from dist_vlm.inputs import PromptInputs
from dist_vlm.outputs import RequestOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.server.answers import Delta, Deltas
from dist_vlm.server.engine_answers import answers
from dist_vlm.server.fields import SamplingFields
from dist_vlm.server.merging import merged
from dist_vlm.server.services import Services


@dataclass(frozen=True, slots=True)
class Heading:
    """What every object of an answer begins with."""

    id: str
    created: int
    model: str

    def of(self, object_name: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model}


class Exchange(ABC):
    """Prompts and how they are answered.

    heading: its id is never used again, though a client may name two requests alike.
    fields: the body, without what the prompts were made of.
    """

    def __init__(
        self,
        services: Services,
        *,
        heading: Heading,
        fields: SamplingFields,
        prompts: Sequence[PromptInputs],
        params: SamplingParams,
        arrival_time: float,
    ) -> None:
        self._services = services
        self.heading = heading
        self.fields = fields
        self._prompts = prompts
        self.params = params
        self._meters = [services.metrics.request(params, arrival_time) for _ in prompts]
        self._deltas = [Deltas() for _ in prompts]

    @property
    def streams(self) -> bool:
        return bool(self.fields.stream)

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with a chunk for the usage."""
        options = self.fields.stream_options
        return options is not None and bool(options.include_usage)

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Starts the engine's work. Yields the number of a prompt with its output, each time one has grown; closing
        it ends the work. Raises `ApiError` for the first prompt that fails; the others are then aborted."""
        sources = [
            answers(
                self._services,
                prompt,
                self.params,
                request_id=self.heading.id if len(self._prompts) == 1 else f"{self.heading.id}-{index}",
                meter=self._meters[index],
            )
            for index, prompt in enumerate(self._prompts)
        ]
        async with aclosing(merged(sources)) as news:
            async for index, output in news:
                yield index, output

    async def answer(self, outputs: AsyncGenerator[tuple[int, RequestOutput], None]) -> dict[str, Any]:
        """The whole answer, once all prompts have theirs."""
        finished: dict[int, RequestOutput] = {}
        async with aclosing(outputs):
            async for index, output in outputs:
                if output.finished:
                    finished[index] = output
        return self.whole([finished[index] for index in range(len(self._prompts))])

    def new_chunks(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What a stream sends of a prompt's output, as far as it is new."""
        chunks = [self.chunk(index, delta, output) for delta in self._deltas[index].of(output)]
        if self.tells_usage:
            for chunk in chunks:
                chunk["usage"] = None
        return chunks

    @abstractmethod
    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream sends before anything of the answers."""

    @abstractmethod
    def chunk(self, index: int, delta: Delta, output: RequestOutput) -> dict[str, Any]:
        """A part of an answer to prompt `index`."""

    @abstractmethod
    def usage_chunk(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The last chunk of a stream that tells the usage. outputs: the finished ones, of all prompts."""

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer that is not streamed. outputs: the finished ones, in the order of the prompts."""


def new_heading(prefix: str, request_id: str, model: str) -> Heading:
    """request_id: the client's or the server's own name for the request."""
    return Heading(f"{prefix}-{request_id}-{uuid.uuid4().hex[:8]}", int(time.time()), model)
