from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from dist_vlm.launch.jsonl import parse_line, read_lines
from dist_vlm.launch.line_source import LINES_OF_A_PART, MAX_PARTS, LineParts, LineSource, part_size

LINES = [
    b'\xef\xbb\xbf{"prompt": "with a mark"}\r\n',
    b"\n",
    '{"prompt": "ü", "id": "two"}\n'.encode(),
    b"{broken\n",
    b'{"prompt": "a\\u2028b \xe2\x80\xa8 c"}\n',  # what separates lines in a text is none in a file
    b"   \n",
    *(json.dumps({"prompt": str(index)}).encode() + b"\n" for index in range(20)),
    b'{"prompt": "without an end"}',
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(LINES))
    return path


@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("answered", [set(), {1, 5, 9, 10, 11, 27}, {3}, set(range(2, 28))])
def test_the_parts_hold_each_line_without_an_answer_once_and_in_order(
    path: Path, size: int, answered: set[int]
) -> None:
    with path.open("rb") as file:
        parts = LineParts(file, answered.__contains__, size=size)
        expected = [line for line in read_lines(path.open("rb")) if line.index not in answered]
    source = LineSource(str(path), parts)
    found = [source.part(number) for number in range(len(parts))]
    assert all(1 <= len(part) <= size for part in found)
    assert [parse_line(raw, index) for part in found for index, raw in part] == expected
    assert parts.num_lines == len(expected)
    assert len(parts) == -(-len(expected) // size)


def test_parts_may_be_asked_for_in_any_order(path: Path) -> None:
    with path.open("rb") as file:
        source = LineSource(str(path), LineParts(file, lambda index: False, size=2))
    assert source.part(3) == source.part(3) != source.part(1)


def test_an_input_that_is_answered_has_no_parts(path: Path) -> None:
    with path.open("rb") as file:
        assert len(LineParts(file, lambda index: True)) == 0


def test_a_mark_alone_is_a_blank_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf\n{"prompt": "a"}\n')
    with (tmp_path / "in.jsonl").open("rb") as file:
        parts = LineParts(file, lambda index: False)
    assert (parts.num_lines, len(parts)) == (1, 1)
    assert LineSource(str(tmp_path / "in.jsonl"), parts).part(0) == [(2, b'{"prompt": "a"}\n')]


@pytest.mark.parametrize("depth", [400, 900, 100_000])
def test_lines_nested_deeply_can_be_sent(tmp_path: Path, depth: int) -> None:
    raw = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}\n"
    (tmp_path / "in.jsonl").write_bytes(raw)
    with (tmp_path / "in.jsonl").open("rb") as file:
        parts = LineParts(file, lambda index: False)
    assert pickle.loads(pickle.dumps(LineSource(str(tmp_path / "in.jsonl"), parts).part(0))) == [(1, raw)]


@pytest.mark.parametrize("num_lines", [0, 1, 8, 159_999, 160_001, 10**7])
def test_there_are_so_many_parts_at_most(num_lines: int) -> None:
    size = part_size(num_lines)
    assert size >= LINES_OF_A_PART
    assert num_lines <= size * MAX_PARTS
    assert size == LINES_OF_A_PART or (size - 1) * MAX_PARTS < num_lines
