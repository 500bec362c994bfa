"""A prompt as typed, and where its pictures go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_vlm import TextPrompt


def with_pictures(tokenizer: Any, image_token_id: int | None, text: str, pictures: Sequence[Any]) -> TextPrompt:
    """The text as it stands where it places its pictures, else as one turn of the checkpoint's chat template.

    Raises `ValueError` where a template is needed and the checkpoint has none.
    """
    if not pictures:
        return {"prompt": text}
    if image_token_id is not None and tokenizer.convert_ids_to_tokens(image_token_id) not in text:
        text = chat_turn(tokenizer, text, num_pictures=len(pictures))
    return {"prompt": text, "multi_modal_data": {"image": list(pictures)}}


def chat_turn(tokenizer: Any, text: str, *, num_pictures: int) -> str:
    """One user's turn, its pictures before its text, in the checkpoint's chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the checkpoint has no chat template: mark the place of each picture in the prompt with <image>"
        )
    content = [{"type": "image"}] * num_pictures + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    turn: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return turn
