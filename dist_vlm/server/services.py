"""What the endpoints share."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config_server import ServerConfig
from dist_vlm.engine.chat import ChatOptions
from dist_vlm.engine.chat_content import Message
from dist_vlm.server.admission import Admission
from dist_vlm.server.body import BodyReader
from dist_vlm.server.byte_budget import ByteBudget
from dist_vlm.server.errors import ApiError
from dist_vlm.server.fields import short
from dist_vlm.server.health import HealthMonitor
from dist_vlm.server.metrics import Metrics
from dist_vlm.server.pictures import PictureIntake

Result = TypeVar("Result")

# No vocabulary writes so much text in so few tokens; what has more is not even tokenized.
_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, kw_only=True)
class Services:
    """bodies, arrays: budgets of request bodies and of preprocessed pictures. renderers: threads for what takes
    processor time: templates and tokenizers."""

    llm: AsyncLLM
    config: ServerConfig
    model: str
    created: int
    admission: Admission
    body_reader: BodyReader
    bodies: ByteBudget
    arrays: ByteBudget
    pictures: PictureIntake
    health: HealthMonitor
    metrics: Metrics
    renderers: ThreadPoolExecutor

    @property
    def max_model_len(self) -> int:
        length = self.llm.config.model.max_model_len
        assert length is not None, "resolve() decides it"
        return length

    def check_model(self, name: str | None) -> None:
        """Raises a 404 for another model's name; none means the one that is served."""
        if name is not None and name != self.model:
            text = f"model = {short(name)}: is not served here; served is {self.model!r}"
            raise ApiError(404, text, param="model", code="model_not_found")

    def check_text(self, name: str, size: int, *, what: str = "characters of text") -> None:
        """Raises `ValueError` for text, or a list, that is too long whatever its tokens are.

        what: what `size` counts.
        """
        most = _CHARACTERS_PER_TOKEN * self.max_model_len
        if size > most:
            raise ValueError(
                f"{name} has {size} {what}; at most {most} are read, for the model takes {self.max_model_len} tokens"
            )

    @property
    def image_bytes(self) -> int:
        """Bytes of one preprocessed picture."""
        shape = self.llm.front.spec.image_input_shape
        return 4 * math.prod(shape) if shape is not None else 0

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.renderers, work)

    async def render(self, conversation: Sequence[Message], options: ChatOptions) -> tuple[str, list[int]]:
        """A conversation's prompt and its tokens, one placeholder for each picture. Raises `ValueError`."""
        num_characters = sum(len(text) for message in conversation for text in message.texts)
        self.check_text("messages", num_characters)
        return await self.in_thread(lambda: self.llm.front.chat.render_text(conversation, options))
