from __future__ import annotations

import hashlib
from typing import Any

import pytest

from dist_vlm.launch import bench_workload
from dist_vlm.launch.bench_workload import image, prompt, request, requests, token_prompt, words

# Of the pictures and prompts with which other engines were measured.
DIGESTS = {
    0: "e49983e8c9aad4673bffb90ba6d562a6b7042303dfca6a2bc1861bdd2687e67c",
    1: "a03405af67a6dc1271b6a77e4efb235781e8415a7959de7b3522d12af1c244a1",
    2: "455b65523010cb7c70653729aaa4c9f1bd2f5d6f2507c1a7835466b5cbceff06",
}
PROMPT_0 = (
    "USER: <image>\nvalue index quick while in self value import self return print lazy in jumps import jumps fox"
    " while range jumps import fox brown class self range fox return index class lazy range self of in while "
    "quick range the brown value the self class dog class brown lazy ASSISTANT:"
)
PROMPT_511 = (
    "USER: <image>\nfox of fox jumps dog self lazy while print jumps jumps in range the import brown fox brown "
    "index in fox return quick over lazy jumps value brown brown brown import lazy value dog while range in index"
    " lazy fox of return over fox while the return the ASSISTANT:"
)


def test_pictures_and_prompts_are_those_of_the_other_engines() -> None:
    made = [image(index) for index in DIGESTS]
    assert [(one.mode, one.size) for one in made] == [("RGB", (336, 336)), ("RGB", (640, 480)), ("RGB", (1024, 768))]
    assert {index: hashlib.sha256(made[index].tobytes()).hexdigest() for index in DIGESTS} == DIGESTS
    assert (prompt(0), prompt(511)) == (PROMPT_0, PROMPT_511)
    assert len(words(0).split()) == len(words(511).split()) == bench_workload.NUM_WORDS == 48


def test_a_request_has_its_own_picture_and_may_have_anothers_words() -> None:
    (own,) = requests([4])
    lent = request(7, text_of=4)
    assert own["prompt"] == lent["prompt"] == prompt(4)
    pictures = [one["multi_modal_data"]["image"] for one in (own, lent)]  # type: ignore[index, call-overload]
    assert [one.tobytes() for one in pictures] == [image(4).tobytes(), image(7).tobytes()]
    assert pictures[0].size == pictures[1].size == (640, 480)


class Tokenizer:
    """A token for each word, its length, and one before them."""

    def encode(self, text: str) -> list[Any]:
        return [99, *map(len, text.split())]


def test_a_prompt_of_tokens_is_the_beginning_of_the_words() -> None:
    assert token_prompt(Tokenizer(), 511, num_tokens=5) == {"prompt_token_ids": [99, 3, 2, 3, 5]}
    assert len(token_prompt(Tokenizer(), 511, num_tokens=49)["prompt_token_ids"]) == 49
    with pytest.raises(ValueError, match="prompt 511 of the workload is 49 tokens: must be at least 50"):
        token_prompt(Tokenizer(), 511, num_tokens=50)
