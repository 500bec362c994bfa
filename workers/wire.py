"""msgpack codec of the contract's dataclasses and named tuples, with a closed schema.

Either crosses as the array of its fields in order; nothing of its class is written, and a reader
names the class it expects. Whatever does not fit the class's type hints is a `WireError`. Nothing here
unpickles.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgpack

T = TypeVar("T")


class WireError(ValueError):
    """Bytes that are not a message of the expected class."""


def encode(message: Any) -> bytes:
    """Packs a dataclass or named tuple of the contract."""
    packed: bytes = msgpack.packb(message, default=_fields_of, use_bin_type=True)
    return packed


def decode(cls: type[T], data: bytes) -> T:
    """Reads a message of class `cls`. Raises `WireError` on anything else."""
    try:
        raw = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True)
    except Exception as error:
        raise WireError(f"not a msgpack message: {type(error).__name__}") from None
    message: T = _reader(typing.cast(Any, cls))(raw)
    return message


def _fields_of(value: Any) -> tuple[Any, ...]:
    """A dataclass as its fields in order: msgpack asks for what it cannot pack itself, and walks the rest in C."""
    cls: type[Any] = type(value)
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"the wire format has no writer for {cls.__name__}")
    return tuple([getattr(value, name) for name in _field_names(cls)])


def _are_all(values: Iterable[Any], cls: type) -> bool:
    # A set of types is built in C: an order of magnitude faster than a walk, on what most of a plan is.
    return set(map(type, values)) <= {cls}


@functools.cache
def _field_names(cls: type) -> tuple[str, ...]:
    if _is_named_tuple(cls):
        return tuple(typing.get_type_hints(cls))
    return tuple(field.name for field in dataclasses.fields(cls))


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


@functools.cache
def _reader(hint: Any) -> Callable[[Any], Any]:
    """A function that turns an unpacked value into a value of type `hint`, or raises `WireError`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass_reader(typing.cast(type, hint))
    if _is_named_tuple(hint):
        read_rows = _rows_reader(hint)
        return lambda value: read_rows((value,))[0]
    if origin is tuple:
        return _tuple_reader(args)
    if origin is dict:
        return _dict_reader(*args)
    if origin in (typing.Union, types.UnionType):
        return _optional_reader(args)
    if hint in (int, float, str, bool, bytes):
        return _scalar_reader(hint)
    raise TypeError(f"the wire format has no reader for {hint!r}")


def _scalar_reader(hint: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is hint:
            return value
        if hint is float and type(value) is int:
            return float(value)
        raise WireError(f"expected {hint.__name__}, got {type(value).__name__}")

    return read


def _tuple_reader(args: tuple[Any, ...]) -> Callable[[Any], Any]:
    if len(args) == 2 and args[1] is Ellipsis:
        items = _column_reader(args[0])

        def read_many(value: Any) -> Any:
            _expect_array(value)
            return items(value) if value else value

        return read_many
    readers = tuple(_reader(arg) for arg in args)

    def read_fixed(value: Any) -> Any:
        _expect_array(value, len(readers))
        return tuple(reader(entry) for reader, entry in zip(readers, value, strict=True))

    return read_fixed


def _dict_reader(key_hint: Any, value_hint: Any) -> Callable[[Any], Any]:
    key, item = _reader(key_hint), _reader(value_hint)

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise WireError(f"expected a map, got {type(value).__name__}")
        return {key(k): item(v) for k, v in value.items()}

    return read


def _optional_reader(args: tuple[Any, ...]) -> Callable[[Any], Any]:
    inner = [arg for arg in args if arg is not type(None)]
    if len(inner) != 1 or len(args) != 2:
        raise TypeError(f"the wire format reads a union only of one type and None, not {args!r}")
    reader = _reader(inner[0])
    return lambda value: None if value is None else reader(value)


def _dataclass_reader(cls: type) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(cls)
    readers = tuple(_reader(hints[name]) for name in _field_names(cls))

    def read(value: Any) -> Any:
        _expect_array(value, len(readers))
        try:
            return cls(*(reader(entry) for reader, entry in zip(readers, value, strict=True)))
        except WireError as error:
            raise WireError(f"{cls.__name__}: {error}") from None

    return read


def _rows_reader(cls: type) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Reads many named tuples of one class, field by field."""
    hints = typing.get_type_hints(cls)
    readers = tuple(_column_reader(hints[name]) for name in _field_names(cls))
    make = functools.partial(tuple.__new__, cls)

    def read(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        if not _are_all(rows, tuple) or not set(map(len, rows)) <= {len(readers)}:
            for row in rows:
                _expect_array(row, len(readers))
        if not rows:
            return ()
        try:
            columns = [reader(column) for reader, column in zip(readers, zip(*rows, strict=True), strict=True)]
        except WireError as error:
            raise WireError(f"{cls.__name__}: {error}") from None
        return tuple(map(make, zip(*columns, strict=True)))

    return read


@functools.cache
def _column_reader(hint: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Reads many values of one type at once."""
    args = typing.get_args(hint)
    if _is_named_tuple(hint):
        return _rows_reader(hint)
    read = _reader(hint)

    def read_each(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple([read(value) for value in values])

    if hint in (int, str, bool, bytes):
        return lambda values: values if _are_all(values, hint) else read_each(values)
    if typing.get_origin(hint) is tuple and args[1:] == (Ellipsis,):
        holds_ints = args[0] is int

        def read_arrays(values: tuple[Any, ...]) -> tuple[Any, ...]:
            if _are_all(values, tuple):
                if not any(values):  # which these arrays mostly are: empty
                    return values
                if holds_ints and _are_all(itertools.chain.from_iterable(values), int):
                    return values
            return read_each(values)

        return read_arrays
    return read_each


def _expect_array(value: Any, length: int | None = None) -> None:
    if type(value) is not tuple:
        raise WireError(f"expected an array, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise WireError(f"expected {length} entries, got {len(value)}")
