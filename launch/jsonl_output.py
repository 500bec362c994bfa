"""The file of answers: one whole line for each line of the input that has been answered, in the order of their ends."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from array import array
from collections.abc import Iterable
from typing import Any, BinaryIO, Self

from dist_vlm.launch.jsonl import Line

_BEGIN = b'{"id": '


class AnswerFile:
    """Appends records and knows which lines of the input have one.

    A record is written with its newline in one go, so a run that is killed leaves whole records and at most one cut
    one, the last. Opening the file again cuts that off.
    """

    def __init__(self, path: str, *, max_index: int, resume: bool) -> None:
        """max_index: no line of the input has a higher number.
        resume: go on with what is there; otherwise the file must be missing or empty.

        Raises `ValueError` where another run writes the file or it holds anything but answers.
        """
        self._path, self._max_index = path, max_index
        self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115 (see close)
        # For each line of the input a checksum of its id, 0 where it has no answer: a few bytes a line.
        self._answered = array("I", [0])
        self.num_answered = 0
        try:
            self._lock()
            if not resume and os.fstat(self._file.fileno()).st_size:
                raise ValueError(f"{path} exists and is not empty; --resume goes on with it")
            self._read()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self._path}: another run is writing it") from None

    def _read(self) -> None:
        whole_bytes = 0
        with open(self._path, "rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{self._path}, line {number}"
                if not raw.endswith(b"\n") and (raw.startswith(_BEGIN) or _BEGIN.startswith(raw)):
                    break
                index, name = _index_and_id(raw, where)
                if not 1 <= index <= self._max_index:
                    raise ValueError(f"{where}: the input has no line {index}")
                if self.has(index):
                    raise ValueError(f"{self._path} has two answers to line {index} of its input")
                self._note(index, name)
                whole_bytes += len(raw)
        self._file.truncate(whole_bytes)

    def _note(self, index: int, name: str | int) -> None:
        if index >= len(self._answered):
            self._answered.frombytes(bytes(self._answered.itemsize * (index + 1 - len(self._answered))))
        self._answered[index] = _checksum(name)
        self.num_answered += 1

    def has(self, index: int) -> bool:
        return index < len(self._answered) and self._answered[index] != 0

    def check_belongs_to(self, lines: Iterable[Line]) -> None:
        """Raises `ValueError` if an answer in the file cannot be one to these lines, the whole input."""
        found = 0
        for line in lines:
            if self.has(line.index):
                found += 1
                if self._answered[line.index] != _checksum(line.id):
                    raise ValueError(
                        f"{self._path} has an answer to line {line.index} under another id than {line.id!r}: "
                        "it belongs to another input, or the input was changed"
                    )
        if found < self.num_answered:
            raise ValueError(
                f"{self._path} has {self.num_answered - found} answers to lines that the input does not have: "
                "it belongs to another input, or the input was changed"
            )

    def append(self, line: Line, answer: dict[str, Any]) -> None:
        """Writes the answer to a line, whole. Raises `ValueError`, and writes nothing, where the line has one."""
        if self.has(line.index):
            raise ValueError(f"{self._path} has an answer to line {line.index} of its input already")
        text = json.dumps({"id": line.id, "index": line.index, **answer}, ensure_ascii=False)
        # Half a surrogate pair, which UTF-8 cannot hold, becomes JSON's own escape of it.
        content = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
        while content:
            content = content[self._file.write(content) :]
        self._note(line.index, line.id)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _checksum(name: str | int) -> int:
    return zlib.crc32(json.dumps(name).encode()) or 1


def _index_and_id(raw: bytes, where: str) -> tuple[int, str | int]:
    try:
        record = json.loads(raw)
        index, name = record["index"], record["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        index = name = None
    if type(index) is not int or not isinstance(name, (str, int)):
        raise ValueError(f"{where} is no answer that this command wrote")
    return index, name
