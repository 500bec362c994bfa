from __future__ import annotations

import base64
from pathlib import Path

import pytest

from dist_vlm.engine.chat_content import parse_messages
from examples.openai_vision_client import messages_of, url_of

DIGIT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "pictures" / "digit.png"


@pytest.mark.parametrize("url", ["https://a.example/b.jpg", "http://a.example/b", "data:image/png;base64,AA=="])
def test_a_url_is_left_to_the_server(url: str) -> None:
    assert url_of(url) == url


def test_a_file_is_sent_along(tmp_path: Path) -> None:
    head, data = url_of(str(DIGIT)).split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == DIGIT.read_bytes()


def test_the_messages_are_what_the_server_takes() -> None:
    (message,) = parse_messages(messages_of(str(DIGIT), "What digit is this?"))
    assert message.fields == {"role": "user"}
    assert isinstance(message.content, tuple)
    question, picture = message.content
    assert question == "What digit is this?"
    assert not isinstance(picture, str)
    assert picture.open(max_pixels=10**6).size == (128, 128)
