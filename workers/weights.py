"""Where a rank's weights come from: a directory of safetensors, or random numbers of the right shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor

    from dist_vlm.workers.config import RankConfig
    from dist_vlm.workers.models.spec import ModelSpec

LOAD_FORMATS = ("safetensors", "dummy")


class WeightSource(ABC):
    """Named tensors, read a slice at a time. Remembers which names were asked for.

    bytes_read: bytes of tensors read from files so far.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._asked: set[str] = set()

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def names(self) -> frozenset[str]:
        """All tensors of the checkpoint; empty where the source makes up what it is asked for."""

    @abstractmethod
    def _fill(self, target: Tensor, name: str, shape: tuple[int, ...], rows: slice, columns: slice) -> None: ...

    def copy_into(self, target: Tensor, name: str, *, shape: tuple[int, ...], index: tuple[slice, ...] = ()) -> None:
        """Fills `target`, of any device and floating dtype, with `tensor[index]`.

        shape: the whole tensor's shape, as the model expects it. index: at most one slice for the first axis and
        one for the second; the second only for matrices.
        Raises `CheckpointError` naming file and tensor where the checkpoint does not have it so.
        """
        self._asked.add(name)
        rows, columns = (*index, slice(None), slice(None))[:2]
        if columns != slice(None) and len(shape) != 2:
            raise ValueError(f"{name}: the second axis of shape {list(shape)} cannot be sliced, only a matrix's")
        self._fill(target.detach(), name, shape, rows, columns)

    def skip(self, name: str) -> None:
        """Notes a tensor as known that this rank does not need."""
        self._asked.add(name)

    def unasked(self, prefix: str) -> list[str]:
        """Tensors whose name starts with `prefix` and that were neither read nor skipped, sorted."""
        return sorted(name for name in self.names() - self._asked if name.startswith(prefix))

    @abstractmethod
    def close(self) -> None:
        """Releases what the source holds open; it can be used again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_weights(config: RankConfig, spec: ModelSpec) -> WeightSource:
    """The source that `config.load_format` names, over the checkpoint of `spec`."""
    if config.load_format == "safetensors":
        from dist_vlm.workers.safetensors_source import SafetensorsSource

        return SafetensorsSource(spec.path)
    if config.load_format == "dummy":
        from dist_vlm.workers.dummy_source import DummySource

        return DummySource(config.seed)
    raise ValueError(f"load_format is {config.load_format!r}, must be one of {', '.join(LOAD_FORMATS)}")
