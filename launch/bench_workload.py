"""The requests that are measured: each has a number, which decides its picture and its words on any machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from dist_vlm.inputs import TextPrompt, TokensPrompt

# Width and height; the number's remainder chooses.
SIZES = ((336, 336), (640, 480), (1024, 768))
NUM_WORDS = 48
_WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "import",
    "class", "return", "value", "index", "of", "self", "in", "range", "print",
)  # fmt: skip
# Pictures of noise are made this much smaller, so that they have structure at the size of a patch.
_SHRINK = 16
# Numbers of the first request of each measurement: an engine that serves several has seen none of the next one's.
THROUGHPUT, LATENCY = 0, 300_000
# What warms up has numbers that no measured request has: this much above theirs.
WARM_UP = 1_000_000


def image(index: int) -> Image.Image:
    """An RGB picture of `SIZES[index % 3]`: coarse noise, blown up."""
    import numpy as np
    from PIL import Image

    width, height = SIZES[index % len(SIZES)]
    shape = (height // _SHRINK, width // _SHRINK, 3)
    noise = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def words(index: int) -> str:
    chosen = random.Random(index)
    return " ".join(chosen.choice(_WORDS) for _ in range(NUM_WORDS))


def prompt(index: int) -> str:
    return f"USER: <image>\n{words(index)} ASSISTANT:"


def request(index: int, *, text_of: int | None = None) -> TextPrompt:
    """The picture of one number with its prompt, or with that of the number `text_of`."""
    return {"prompt": prompt(index if text_of is None else text_of), "multi_modal_data": {"image": image(index)}}


def requests(numbers: Sequence[int]) -> list[TextPrompt]:
    return [request(index) for index in numbers]


def token_prompt(tokenizer: Any, index: int, *, num_tokens: int) -> TokensPrompt:
    """A prompt of text alone, cut to `num_tokens` tokens. Raises `ValueError` where its words are fewer."""
    ids = list(tokenizer.encode(words(index)))
    if len(ids) < num_tokens:
        raise ValueError(f"prompt {index} of the workload is {len(ids)} tokens: must be at least {num_tokens}")
    return {"prompt_token_ids": ids[:num_tokens]}
