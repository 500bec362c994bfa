from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dist_vlm.engine.front import load_tokenizer
from dist_vlm.launch.prompts import chat_turn, with_pictures

IMAGE_ID = 32000


@pytest.fixture(scope="module")
def tokenizer(tiny_facts: Path) -> Any:
    return load_tokenizer(str(tiny_facts))


def test_text_alone_stays_as_it_is(tokenizer: Any) -> None:
    assert with_pictures(tokenizer, IMAGE_ID, "what?", []) == {"prompt": "what?"}


def test_a_prompt_that_places_its_pictures_stays_as_it_is(tokenizer: Any) -> None:
    picture = Image.new("RGB", (2, 2))
    made = with_pictures(tokenizer, IMAGE_ID, "a <image> b", (picture,))
    assert made == {"prompt": "a <image> b", "multi_modal_data": {"image": [picture]}}


def test_other_pictures_go_before_the_text_in_the_template(tokenizer: Any) -> None:
    pictures = [Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))]
    made = with_pictures(tokenizer, IMAGE_ID, "what?", pictures)
    assert made["prompt"] == "USER: <image>\n<image>\nwhat? ASSISTANT:"
    assert made["multi_modal_data"] == {"image": pictures}


def test_without_a_template_the_place_is_asked_for() -> None:
    with pytest.raises(ValueError, match="no chat template: mark the place of each picture in the prompt with <image>"):
        chat_turn(SimpleNamespace(chat_template=None), "what?", num_pictures=1)
