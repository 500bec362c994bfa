"""A rank's images: staged arrays, and the features they were encoded to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np
import torch

from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.models.family import VisionModel
from dist_vlm.workers.plan import ImageFailure

_log = logging.getLogger(__name__)


class ImageStore:
    """Staged arrays by content key. Staging runs beside the steps, in another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: dict[str, tuple[str, np.ndarray]] = {}

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        with self._lock:
            self._images[key] = (kind, array)

    def unstage(self, key: str) -> None:
        with self._lock:
            self._images.pop(key, None)

    def get(self, key: str) -> tuple[str, np.ndarray]:
        with self._lock:
            return self._images[key]


class FeatureStore:
    """Encoded images by content key: tensors [rows, hidden_size]."""

    def __init__(self, *, vision: VisionModel, comm: Communicator, dtype: torch.dtype, device: torch.device) -> None:
        self.vision = vision
        self.comm = comm
        self.dtype = dtype
        self.device = device
        self.features: dict[str, torch.Tensor] = {}

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.features.pop(key, None)  # one that failed was never held; the driver may not know yet

    def encode(self, keys: Sequence[str], images: ImageStore) -> tuple[ImageFailure, ...]:
        """Encodes staged images and returns those that failed on any rank, the same list on every rank.

        A failure keeps no rank from the collective: each encodes what it can, then all agree.
        """
        if not keys:
            return ()
        errors: dict[str, str] = {}
        for key in keys:
            try:
                self.features[key] = self._encode_one(*images.get(key))
            except Exception as error:
                _log.exception("image %s could not be encoded", key)
                errors[key] = type(error).__name__
        failed = self._agree([key in errors for key in keys])
        failures = []
        for key, bad in zip(keys, failed, strict=True):
            if bad:
                self.features.pop(key, None)
                failures.append(ImageFailure(key, "the image could not be encoded"))
        return tuple(failures)

    def _encode_one(self, kind: str, array: np.ndarray) -> torch.Tensor:
        # torch lets cuDNN round a float32 convolution's operands to TF32; asked for float32, we mean it.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=self.dtype != torch.float32):
            return self._encode_array(kind, array)

    def _encode_array(self, kind: str, array: np.ndarray) -> torch.Tensor:
        # A staged array is read-only and shared with other ranks: copy it before it becomes a tensor.
        tensor = torch.from_numpy(np.array(array)).to(device=self.device, dtype=self.dtype)
        if kind == "pixel_values":
            return self.vision.encode_pixels(tensor)[0]
        return self.vision.project_features(tensor)[0]

    def _agree(self, failed_here: list[bool]) -> list[bool]:
        votes = torch.tensor(failed_here, dtype=torch.float32, device=self.device)
        return [bool(vote) for vote in self.comm.all_reduce(votes).tolist()]
