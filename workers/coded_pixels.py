"""Pictures as bytes, with the table that says which number each byte stands for: a quarter of their pixel values' size.

A coded picture is uint8 [1, channels, table rows + height, width]. Of each channel the first `table_rows(width)` rows
hold 256 numbers, float32, little-endian, and zeros behind them; the others hold each pixel's place in the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_TABLE_BYTES = 256 * 4


def table_rows(width: int) -> int:
    return -(-_TABLE_BYTES // width)


def coded_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of pixel values' shape [images, channels, height, width]."""
    images, channels, height, width = shape
    return images, channels, table_rows(width) + height, width


def blank_coded(table: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """A coded picture of `table`, float32 [channels, 256], all of whose pixels stand for its first number."""
    coded = np.zeros(coded_shape((1, len(table), height, width)), np.uint8)
    rows = np.zeros((len(table), table_rows(width) * width), np.uint8)
    rows[:, :_TABLE_BYTES] = np.ascontiguousarray(table, dtype="<f4").view(np.uint8)
    coded[0, :, : table_rows(width)] = rows.reshape(len(table), -1, width)
    return coded


def places_of(coded: np.ndarray) -> np.ndarray:
    """The part of a coded picture that holds its pixels, uint8 [1, channels, height, width]: a view, to be filled."""
    return coded[:, :, table_rows(coded.shape[-1]) :]


def decoded(coded: np.ndarray) -> np.ndarray:
    """A coded picture's pixel values, float32 [1, channels, height, width]: `decode_pixels` without torch."""
    _, channels, _, width = coded.shape
    tables = coded[0, :, : table_rows(width)].reshape(channels, -1)[:, :_TABLE_BYTES]
    numbers = np.ascontiguousarray(tables).view("<f4").astype(np.float32, copy=False)
    return np.stack([numbers[channel][places] for channel, places in enumerate(places_of(coded)[0])])[None]


def decode_pixels(coded: torch.Tensor) -> torch.Tensor:
    """Coded pictures, uint8 [images, channels, table rows + height, width] -> their pixel values, float32 [images,
    channels, height, width], each by its own table. Raises `ValueError` for a tensor of another kind."""
    import torch  # what codes pictures may be a process without it

    images, channels, rows, width = coded.shape
    head = table_rows(width)
    if coded.dtype != torch.uint8 or rows < head:
        raise ValueError(f"coded pixels {list(coded.shape)}, {coded.dtype}: must be uint8 with {head} rows of table")
    tables = coded[:, :, :head].reshape(images * channels, head * width)[:, :_TABLE_BYTES]
    numbers = tables.clone(memory_format=torch.contiguous_format).view(torch.float32)
    places = coded[:, :, head:].reshape(images * channels, -1).to(torch.int64)
    return numbers.gather(1, places).view(images, channels, rows - head, width)
