"""Weights from a directory of safetensors files, read by slice.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} and the tensors'
bytes, row-major (https://github.com/huggingface/safetensors, "Format"). The bytes are read with `preadv`, straight
into the parameter where dtype and device allow and through a small buffer otherwise. Nothing is mapped into memory:
pages of a mapped file count as resident, and would double a rank's peak while it loads.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vlm.workers.models.spec import CheckpointError
from dist_vlm.workers.weights import WeightSource

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Size of the buffer between file and parameter, by the parameter's device; on a CPU it counts as resident memory.
CHUNK_BYTES = {"cpu": 2**18, "cuda": 2**22}
MAX_HEADER_BYTES = 100 * 2**20
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of one file. offset: of its first byte from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsSource(WeightSource):
    """The tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` lists."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.directory = Path(directory)
        self._entries: dict[str, Entry] = {}
        self._descriptors: dict[Path, int] = {}
        if (self.directory / INDEX_FILE).is_file():
            self._read_index(self.directory / INDEX_FILE)
        elif (self.directory / SINGLE_FILE).is_file():
            self._entries = read_header(self.directory / SINGLE_FILE)
        else:
            raise CheckpointError(f"{self.directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")

    def _read_index(self, index_file: Path) -> None:
        weight_map = _read_weight_map(index_file)
        headers: dict[str, dict[str, Entry]] = {}
        for name, file in weight_map.items():
            if file not in headers:
                if not (self.directory / file).is_file():
                    raise CheckpointError(f"{self.directory / file} is missing; {index_file.name} lists {name} in it")
                headers[file] = read_header(self.directory / file)
            if name not in headers[file]:
                raise CheckpointError(f"{self.directory / file} has no tensor {name}; {index_file.name} lists it there")
            self._entries[name] = headers[file][name]

    def has(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _fill(self, target: Tensor, name: str, shape: tuple[int, ...], rows: slice, columns: slice) -> None:
        entry = self._checked_entry(name, shape)
        num_rows, width = shape[0], math.prod(shape[1:])
        first_row, last_row, _ = rows.indices(num_rows)
        first_column, last_column, _ = columns.indices(width)
        count, span = last_row - first_row, last_column - first_column
        if target.numel() != count * span:
            raise ValueError(f"{name}: a slice of {count} x {span} values cannot fill shape {list(target.shape)}")
        if count == 0 or span == 0:
            return
        matrix, dtype = target.view(count, span), DTYPES[entry.dtype]
        row_bytes = width * dtype.itemsize
        offset = entry.offset + first_row * row_bytes + first_column * dtype.itemsize
        if target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
            self._read_rows(matrix, entry, name, offset=offset, row_bytes=row_bytes)
            return
        step = max(1, CHUNK_BYTES[target.device.type] // (span * dtype.itemsize))
        buffer = torch.empty(min(step, count), span, dtype=dtype, pin_memory=target.device.type == "cuda")
        for start in range(0, count, step):
            part = matrix[start : start + step]
            filled = buffer[: part.shape[0]]
            self._read_rows(filled, entry, name, offset=offset + start * row_bytes, row_bytes=row_bytes)
            part.copy_(filled)

    def _checked_entry(self, name: str, shape: tuple[int, ...]) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        where = f"{entry.file}: tensor {name}"
        if entry.shape != tuple(shape):
            raise CheckpointError(f"{where} has shape {list(entry.shape)}, the configuration asks for {list(shape)}")
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{where} has dtype {entry.dtype}, must be one of {', '.join(DTYPES)}")
        return entry

    def _read_rows(self, matrix: Tensor, entry: Entry, name: str, *, offset: int, row_bytes: int) -> None:
        """Fills a contiguous matrix on the CPU from rows that start at `offset` and lie `row_bytes` apart."""
        view = matrix.flatten().view(torch.uint8).numpy().data
        span = len(view) // matrix.shape[0]
        if span == row_bytes:
            self._read(entry.file, name, view, offset)
        else:
            for row in range(matrix.shape[0]):
                self._read(entry.file, name, view[row * span : (row + 1) * span], offset + row * row_bytes)

    def _read(self, file: Path, name: str, view: memoryview, offset: int) -> None:
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            descriptor = self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], offset + done)
            if got == 0:
                raise CheckpointError(f"{file} is truncated: it ends inside tensor {name}")
            done += got
        self.bytes_read += done


def _read_weight_map(index_file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index_file} is not JSON with a weight_map") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file}: weight_map must be an object of tensor name to file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise CheckpointError(f"{index_file}: tensor {name} lies in {file!r}, must be a file of that directory")
    return weight_map


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises `CheckpointError` for a damaged or truncated one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file} is not a safetensors file, or is truncated: {size} bytes")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        described = {name: fields for name, fields in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError):
        raise CheckpointError(f"{file} is not a safetensors file: its header is not a JSON object") from None
    return {name: _entry(file, name, fields, start=8 + length, size=size) for name, fields in described.items()}


def _entry(file: Path, name: str, fields: dict[str, Any], *, start: int, size: int) -> Entry:
    try:
        dtype, shape = str(fields["dtype"]), tuple(int(extent) for extent in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: the header of tensor {name} is damaged") from None
    if not 0 <= begin <= end or any(extent < 0 for extent in shape):
        raise CheckpointError(f"{file}: the header of tensor {name} is damaged")
    if start + end > size:
        raise CheckpointError(f"{file} is truncated: tensor {name} ends at byte {start + end} of {size}")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f"{file}: tensor {name} has {end - begin} bytes, its shape {list(shape)} needs others")
    return Entry(file, dtype, shape, start + begin)
