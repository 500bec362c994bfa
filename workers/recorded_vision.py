"""A vision model whose small batches are recorded: of one image, launching takes longer than computing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dist_vlm.workers.graph import Recording
from dist_vlm.workers.models.family import VisionModel

_log = logging.getLogger(__name__)

# Greater ones keep a GPU busy for longer than they take to launch.
MAX_IMAGES = 4


class RecordedVision(VisionModel):
    """Records a batch size when it is first asked for. What `encode_pixels` returns is overwritten by its next call."""

    def __init__(self, vision: VisionModel, *, device: torch.device) -> None:
        self.module = vision.module
        self._vision = vision
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._recordings: dict[tuple[int, ...], tuple[Tensor, Recording[Tensor]]] = {}

    def encode_pixels(self, pixel_values: Tensor) -> Tensor:
        if not 0 < pixel_values.shape[0] <= MAX_IMAGES:
            return self._vision.encode_pixels(pixel_values)
        shape = tuple(pixel_values.shape)
        if shape not in self._recordings:
            return self._record(pixel_values)
        held, recording = self._recordings[shape]
        held.copy_(pixel_values)
        return recording.replay()

    def record(self, counts: Iterable[int], *, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Records batches ahead of the first that is asked for. shape: of one image, [channels, height, width]."""
        # As an encoder sets it, see there.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=dtype != torch.float32):
            for count in counts:
                self.encode_pixels(torch.zeros((count, *shape), dtype=dtype, device=self._device))

    def _record(self, pixel_values: Tensor) -> Tensor:
        began = time.perf_counter()
        held = pixel_values.clone()
        recording = Recording(lambda: self._vision.encode_pixels(held), device=self._device, pool=self._pool)
        self._recordings[tuple(pixel_values.shape)] = held, recording
        _log.info("recorded the encoding of %d images in %.2f s", held.shape[0], time.perf_counter() - began)
        return recording.replay()

    def project_features(self, features: Tensor) -> Tensor:
        return self._vision.project_features(features)
