from __future__ import annotations

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest

from dist_vlm.engine.images import PreparedImage
from dist_vlm.launch.jsonl import Line
from dist_vlm.launch.line_table import AnsweredLine, PreparedLine, answered_lines, named_lines, prepared_lines

LINE = Line(7, "a\ud800name", {"prompt": "ü \ud800", "stop": ["x"], "temperature": 0.1, "id": None})


def test_a_prepared_line_comes_back_with_its_pictures() -> None:
    generator = np.random.default_rng(1)
    coded = PreparedImage("0" * 32, "coded_pixels", generator.integers(0, 256, (3, 8, 6), dtype=np.uint8))
    pixels = PreparedImage("1" * 32, "pixel_values", generator.random((1, 3, 4, 4), dtype=np.float32))
    (back,) = prepared_lines(PreparedLine(LINE, [coded, pixels]).table())
    assert (back.line, back.error) == (LINE, None)
    for one, other in zip(back.images, (coded, pixels), strict=True):
        assert (one.key, one.kind, one.array.dtype) == (other.key, other.kind, other.array.dtype)
        np.testing.assert_array_equal(one.array, other.array)


def test_arrays_are_not_copied_out_of_the_table() -> None:
    table = PreparedLine(LINE, [PreparedImage("k", "coded_pixels", np.zeros(1 << 20, np.uint8))]).table()
    before = pa.total_allocated_bytes()
    (back,) = prepared_lines(table)
    assert back.images[0].array.nbytes == 1 << 20
    assert not back.images[0].array.flags.owndata
    assert pa.total_allocated_bytes() - before < 1 << 16


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


def test_values_of_a_wrong_line_stay_where_they_are() -> None:
    line = Line(3, "three", {"prompt": nested(5000)})
    with pytest.raises(RecursionError):
        PreparedLine(line).table()
    (back,) = prepared_lines(PreparedLine(line, error="wrong").table())
    assert back == PreparedLine(Line(3, "three", {}), [], "wrong")


def test_values_that_are_too_deep_for_the_reader_are_its_error() -> None:
    table = PreparedLine(LINE).table()
    text = '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}"
    table = table.set_column(table.schema.get_field_index("values"), "values", pa.array([text]))
    (back,) = prepared_lines(table)
    assert back == PreparedLine(Line(7, LINE.id, {}), [], "the line is nested too deeply")


@pytest.mark.parametrize("name", ["text", 5, "5"])
def test_errors_answers_and_ids_come_back(name: str | int) -> None:
    line = Line(1, name, {})
    (back,) = prepared_lines(PreparedLine(line, error="no picture").table())
    assert (back.line, back.images, back.error) == (line, [], "no picture")
    answer = {"text": "a\ud800", "logprobs": [{"5": {"logprob": -0.1234567890123456789}}], "stop_reason": None}
    table = pa.concat_tables([AnsweredLine(line, answer).table(), AnsweredLine(line, lost="rank 0 died").table()])
    first, second = answered_lines(table)
    assert (first.line, first.answer, first.lost) == (line, answer, None)
    assert (second.line, second.answer, second.lost) == (line, {}, "rank 0 died")
    assert list(named_lines(table)) == [line, line]
