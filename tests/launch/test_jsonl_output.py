from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_vlm.launch.jsonl import Line
from dist_vlm.launch.jsonl_output import AnswerFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def opened(path: Path, *, resume: bool = False, max_index: int = 100) -> AnswerFile:
    return AnswerFile(str(path), max_index=max_index, resume=resume)


def line(index: int, name: str | int | None = None) -> Line:
    return Line(index, index if name is None else name, {})


def write(path: Path, *lines: Line) -> bytes:
    with opened(path) as answers:
        for one in lines:
            answers.append(one, {"text": "an answer"})
    return path.read_bytes()


def test_a_record_is_in_the_file_as_soon_as_it_is_written(path: Path) -> None:
    with opened(path) as answers:
        answers.append(line(3, "x"), {"text": "é\u2028\n"})
        assert path.read_text(encoding="utf-8") == '{"id": "x", "index": 3, "text": "é\u2028\\n"}\n'
        assert answers.has(3)
        assert not answers.has(1)
        assert not answers.has(1000)


def test_a_second_answer_to_a_line_is_refused_and_the_file_stays_whole(path: Path) -> None:
    before = write(path, line(1))
    with opened(path, resume=True) as answers, pytest.raises(ValueError, match="has an answer to line 1 of its input"):
        answers.append(line(1), {"text": "another"})
    assert path.read_bytes() == before
    opened(path, resume=True).close()


def test_half_a_surrogate_pair_comes_back(path: Path) -> None:
    write(path, line(1, "\ud83d"))
    assert json.loads(path.read_bytes())["id"] == "\ud83d"


def test_what_is_there_is_kept_and_gone_on_with(path: Path) -> None:
    before = write(path, line(1), line(4, "x"))
    with opened(path, resume=True) as answers:
        assert answers.num_answered == 2
        assert [index for index in range(9) if answers.has(index)] == [1, 4]
        answers.append(line(2), {"error": "no"})
    assert path.read_bytes() == before + b'{"id": 2, "index": 2, "error": "no"}\n'


def test_every_cut_of_the_last_record_is_cut_off(path: Path) -> None:
    first, second = write(path, line(1), line(2, "long name")).splitlines(keepends=True)
    for length in range(len(second)):
        path.write_bytes(first + second[:length])
        with opened(path, resume=True) as answers:
            assert (answers.has(1), answers.has(2)) == (True, False)
            answers.append(line(2, "long name"), {"text": "an answer"})
        assert path.read_bytes() == first + second


def test_a_new_run_does_not_touch_answers(path: Path) -> None:
    before = write(path, line(1))
    with pytest.raises(ValueError, match=r"out\.jsonl exists and is not empty; --resume goes on with it"):
        opened(path)
    assert path.read_bytes() == before


def test_an_empty_file_is_as_good_as_none(path: Path) -> None:
    path.touch()
    assert write(path, line(1))


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_do_not_write_one_file(path: Path, resume: bool) -> None:
    with opened(path), pytest.raises(ValueError, match="another run is writing it"):
        opened(path, resume=resume)
    opened(path, resume=resume).close()


@pytest.mark.parametrize(
    "content",
    [
        b"some text\n",
        b"some text without an end",
        b'{"prompt": "an input"}\n',
        b"[1, 2]\n",
        b'{"id": 1, "index": "1"}\n',
        b'{"id": 1, "index": true}\n',
        b'{"id": [1], "index": 1}\n',
        b'{"id": 1, "index": 1}\n{"id": 2, "ind\n{"id": 3, "index": 3}\n',
    ],
)
def test_a_file_of_anything_else_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.jsonl, line \d is no answer that this command wrote"):
        opened(path, resume=True)
    assert path.read_bytes() == content


def test_answers_that_no_input_can_have_are_refused(path: Path) -> None:
    write(path, line(7))
    with pytest.raises(ValueError, match="line 1: the input has no line 7"):
        opened(path, resume=True, max_index=6)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="two answers to line 7 of its input"):
        opened(path, resume=True)


def test_another_input_is_noticed(path: Path) -> None:
    write(path, line(1, "a"), line(3, "c"))
    with opened(path, resume=True) as answers:
        answers.check_belongs_to([line(1, "a"), line(2, "b"), line(3, "c"), line(4, "d")])
        with pytest.raises(ValueError, match="answer to line 3 under another id than 'x'"):
            answers.check_belongs_to([line(1, "a"), line(2, "b"), line(3, "x")])
        with pytest.raises(ValueError, match="has 1 answers to lines that the input does not have"):
            answers.check_belongs_to([line(1, "a"), line(2, "b")])


def test_a_number_and_its_text_are_two_ids(path: Path) -> None:
    write(path, line(1, 1))
    with opened(path, resume=True) as answers, pytest.raises(ValueError, match="another id than '1'"):
        answers.check_belongs_to([line(1, "1")])
