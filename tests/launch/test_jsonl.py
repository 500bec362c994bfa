from __future__ import annotations

from io import BytesIO

import pytest

from dist_vlm.launch.jsonl import Line, read_lines


def read(text: bytes) -> list[Line]:
    return list(read_lines(BytesIO(text)))


def test_lines_are_numbered_as_they_stand_and_blank_ones_left_out() -> None:
    lines = read(b'\xef\xbb\xbf{"prompt": "a"}\n\n  \r\n{"id": "x", "prompt": "\xc3\xa9"}\r\n{"id": 7, "n": 2}')
    assert lines == [
        Line(1, 1, {"prompt": "a"}),
        Line(4, "x", {"prompt": "é"}),
        Line(5, 7, {"n": 2}),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"prompt": x}', "the line is not JSON: Expecting value, column 12"),
        (b"\xff\xfe", "the line is not UTF-8 text"),
        (b"[1]", "the line is a JSON list; must be an object"),
        (b'"a"', "the line is a JSON str; must be an object"),
        (b'{"id": 1.5}', "id = 1.5: must be a string or an integer"),
        (b'{"id": true}', "id = True: must be a string or an integer"),
        (b'{"id": [1]}', "id = [1]: must be a string or an integer"),
        (b"[" * 100_000, "the line is nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the line is not JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_told_and_the_next_is_read(text: bytes, problem: str) -> None:
    first, second = read(text + b'\n{"prompt": "b"}\n')
    assert first == Line(1, 1, {}, problem)
    assert second == Line(2, 2, {"prompt": "b"})


def test_an_id_of_none_is_none_given() -> None:
    assert read(b'{"id": null}')[0].id == 1


def test_no_more_is_read_than_asked_for() -> None:
    given = iter([b'{"prompt": "a"}\n', b'{"prompt": "b"}\n'])
    lines = read_lines(given)
    assert next(lines).values == {"prompt": "a"}
    assert next(given) == b'{"prompt": "b"}\n'
