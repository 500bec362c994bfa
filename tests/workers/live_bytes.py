"""Counts the bytes of tensors alive at once, exactly: resident memory tells little of a small model."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, `peak` follows what operations allocate. The tensors of `apart` are left out, and so are their views.

    What an operation allocates and frees inside itself is not seen.
    """

    def __init__(self, apart: list[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes
