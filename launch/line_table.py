"""Lines between the driver, the tasks that prepare pictures and the engines, as Arrow tables of one row a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from dist_vlm.engine.images import PreparedImage
from dist_vlm.launch.jsonl import Line

if TYPE_CHECKING:
    from dist_vlm.executor.base import StageKind

_IMAGE = pa.struct(
    [("key", pa.string()), ("kind", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.large_binary())]
)
_PREPARED = pa.schema(
    [("index", pa.int64()), ("id", pa.string()), ("values", pa.string()), ("error", pa.string()),
     ("images", pa.list_(_IMAGE))]
)  # fmt: skip
_ANSWERED = pa.schema([("index", pa.int64()), ("id", pa.string()), ("answer", pa.string()), ("lost", pa.string())])
_TYPES: dict[str, np.dtype[Any]] = {"coded_pixels": np.dtype("u1"), "pixel_values": np.dtype("<f4")}


@dataclass(frozen=True, slots=True)
class PreparedLine:
    """A line with its pictures ready for the engine, or what is wrong with it: its values do not go along then."""

    line: Line
    images: Sequence[PreparedImage] = ()
    error: str | None = None

    def table(self) -> pa.Table:
        images = [
            {"key": one.key, "kind": one.kind, "shape": list(one.array.shape), "data": _bytes(one)}
            for one in self.images
        ]
        values = json.dumps(self.line.values if self.error is None else {})
        row = {"values": values, "error": self.error, "images": images}
        return pa.Table.from_pylist([_named(self.line) | row], schema=_PREPARED)


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """A line, without its values, and what is to be written for it.

    lost: in place of an answer, what became of the engine that had the line.
    """

    line: Line
    answer: dict[str, Any] = field(default_factory=dict)
    lost: str | None = None

    def table(self) -> pa.Table:
        row = {"answer": json.dumps(self.answer), "lost": self.lost}
        return pa.Table.from_pylist([_named(self.line) | row], schema=_ANSWERED)


def prepared_lines(table: pa.Table) -> Iterator[PreparedLine]:
    """Arrays are views of the table's memory."""
    for row in range(table.num_rows):
        index, name, values, error = (table[key][row].as_py() for key in ("index", "id", "values", "error"))
        images = [_image(one) for one in table["images"][row]]
        line = Line(index, json.loads(name), {})
        try:
            line.values.update(json.loads(values))
        except RecursionError:  # this stack is deeper than the one that read the line before
            images, error = [], "the line is nested too deeply"
        yield PreparedLine(line, images, error)


def answered_lines(table: pa.Table) -> Iterator[AnsweredLine]:
    for row in table.to_pylist():
        line = Line(row["index"], json.loads(row["id"]), {})
        yield AnsweredLine(line, json.loads(row["answer"]), row["lost"])


def named_lines(table: pa.Table) -> Iterator[Line]:
    """The lines of either table, without their values."""
    for row in table.select(["index", "id"]).to_pylist():
        yield Line(row["index"], json.loads(row["id"]), {})


def _named(line: Line) -> dict[str, Any]:
    return {"index": line.index, "id": json.dumps(line.id)}


def _bytes(image: PreparedImage) -> bytes:
    return image.array.astype(_TYPES[image.kind], copy=False).tobytes()


def _image(told: Any) -> PreparedImage:
    kind = cast("StageKind", told["kind"].as_py())
    array: np.ndarray = np.frombuffer(told["data"].as_buffer(), _TYPES[kind]).reshape(told["shape"].as_py())
    return PreparedImage(told["key"].as_py(), kind, array)
