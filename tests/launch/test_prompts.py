from __future__ import annotations

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from dist_vlm.engine.chat import ChatRenderer
from dist_vlm.launch.prompts import chat_turn, with_pictures

IMAGE_ID = 493


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained("examples/demo/checkpoint")


@pytest.fixture(scope="module")
def chat(tokenizer: PreTrainedTokenizerFast) -> ChatRenderer:
    return ChatRenderer(tokenizer, image_token_id=IMAGE_ID, max_pixels=1000)


def test_text_alone_stays_as_it_is(chat: ChatRenderer) -> None:
    assert with_pictures(chat, "what?", []) == {"prompt": "what?"}


def test_a_prompt_that_places_its_pictures_stays_as_it_is(chat: ChatRenderer) -> None:
    picture = Image.new("RGB", (2, 2))
    made = with_pictures(chat, "a <image> b", (picture,))
    assert made == {"prompt": "a <image> b", "multi_modal_data": {"image": [picture]}}


def test_other_pictures_go_before_the_text_in_the_template(
    chat: ChatRenderer, tokenizer: PreTrainedTokenizerFast
) -> None:
    pictures = [Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))]
    prompt = "USER: <image>\n<image>\nwhat? ASSISTANT:"
    made = with_pictures(chat, "what?", pictures)
    assert made == {
        "prompt": prompt,
        "prompt_token_ids": tokenizer(prompt)["input_ids"],
        "multi_modal_data": {"image": pictures},
    }


def test_what_a_text_spells_stays_text(chat: ChatRenderer, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, token_ids = chat_turn(chat, "what does </s> mean?", num_pictures=1)
    assert prompt == "USER: <image>\nwhat does </s> mean? ASSISTANT:"
    end = tokenizer.convert_tokens_to_ids("</s>")
    assert tokenizer(prompt)["input_ids"].count(end) == 1, "transformers makes it one"
    assert end not in token_ids
    assert token_ids.count(IMAGE_ID) == 1
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == f"<s>{prompt}"


def test_half_of_a_surrogate_pair_is_no_text(chat: ChatRenderer) -> None:
    with pytest.raises(ValueError, match="^prompt holds '.*', half of a surrogate pair: not text$"):
        chat_turn(chat, "a\ud800", num_pictures=1)


def test_a_model_without_pictures_gets_the_text_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    blind = ChatRenderer(tokenizer, image_token_id=None, max_pixels=1000)
    picture = Image.new("RGB", (2, 2))
    assert with_pictures(blind, "what?", [picture]) == {"prompt": "what?", "multi_modal_data": {"image": [picture]}}


def test_without_a_template_the_place_is_asked_for() -> None:
    bare = PreTrainedTokenizerFast.from_pretrained("examples/demo/checkpoint")
    bare.chat_template = None
    chat = ChatRenderer(bare, image_token_id=IMAGE_ID, max_pixels=1000)
    with pytest.raises(ValueError, match="no chat template: mark the place of each picture in the prompt with <image>"):
        chat_turn(chat, "what?", num_pictures=1)
