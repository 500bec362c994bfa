"""A prompt as typed, and where its pictures go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_vlm.engine.chat import ChatRenderer
    from dist_vlm.inputs import TextPrompt, TextTokensPrompt


def with_pictures(chat: ChatRenderer, text: str, pictures: Sequence[Any]) -> TextPrompt | TextTokensPrompt:
    """The text as it stands where it places its pictures, else as one turn of the chat template.

    Raises `ValueError` where a template is needed and there is none.
    """
    if not pictures:
        return {"prompt": text}
    images = {"image": list(pictures)}
    if chat.placeholder is None or chat.placeholder in text:
        return {"prompt": text, "multi_modal_data": images}
    prompt, token_ids = chat_turn(chat, text, num_pictures=len(pictures))
    return {"prompt": prompt, "prompt_token_ids": token_ids, "multi_modal_data": images}


def chat_turn(chat: ChatRenderer, text: str, *, num_pictures: int) -> tuple[str, list[int]]:
    """One user's turn in the chat template, its pictures before its text, which stays text where it spells special
    tokens. The prompt, and its tokens with one placeholder for each picture."""
    from dist_vlm.engine.chat import ChatOptions
    from dist_vlm.engine.chat_content import Message, Picture, plain_json

    if not chat.has_template:
        raise ValueError(
            "the checkpoint has no chat template: mark the place of each picture in the prompt with <image>"
        )
    pictures = [Picture("", f"picture {index}") for index in range(num_pictures)]  # rendering opens none
    turn = Message((*pictures, plain_json(text, "prompt")), {"role": "user"})
    return chat.render_text([turn], ChatOptions())
