"""Encodes images in batches on one rank; what fails is cut until the guilty image stands alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dist_vlm.workers.coded_pixels import decode_pixels
from dist_vlm.workers.models.family import VisionModel

_log = logging.getLogger(__name__)

NOT_ENCODED = "the image could not be encoded"
NO_MEMORY = "there was not enough memory to encode the image"
NOT_FINITE = "the image's features are not finite numbers"
# In the order in which one is chosen where ranks report several.
FAILURE_REASONS = (NOT_ENCODED, NO_MEMORY, NOT_FINITE)


@dataclass(frozen=True, slots=True)
class StagedImage:
    """An image to encode.

    kind: "coded_pixels", "pixel_values" or "image_features", the stage at which it enters.
    array: [1, ...], bytes of coded pixels, or numbers that float32 holds. Read only, and shared with other ranks.
    """

    key: str
    kind: str
    array: np.ndarray


@dataclass(slots=True)
class Encoded:
    """What became of images, by content key.

    features: [rows, hidden_size], each a tensor of its own.
    finite: for each of `features` whether all its numbers are; on a GPU nobody has waited for it yet.
    failed: one of FAILURE_REASONS.
    """

    features: dict[str, torch.Tensor] = field(default_factory=dict)
    finite: dict[str, torch.Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class ImageEncoder:
    """Runs a rank's vision model.

    batch_images: images encoded at once, at most.
    num_encoded: images encoded since the start.
    """

    def __init__(self, *, vision: VisionModel, dtype: torch.dtype, device: torch.device, batch_images: int) -> None:
        if batch_images < 1:
            raise ValueError(f"batch_images = {batch_images}: must be at least 1")
        self.vision = vision
        self.dtype = dtype
        self.device = device
        self.batch_images = batch_images
        self.num_encoded = 0

    def encode(self, images: Sequence[StagedImage], *, is_checked: bool = True) -> Encoded:
        """Encodes images of any kinds. Raises nothing that an image or a lack of memory is the cause of.

        is_checked: whether features that are not finite fail here; otherwise nobody waits for the device.
        """
        groups: dict[tuple[str, tuple[int, ...]], list[StagedImage]] = {}
        for image in images:
            groups.setdefault((image.kind, image.array.shape), []).append(image)
        done = Encoded()
        for group in groups.values():
            self._encode_group(group, done)
        if is_checked:
            self._fail_what_is_not_finite(done)
        self.num_encoded += len(done.features)
        return done

    def _encode_group(self, group: list[StagedImage], done: Encoded) -> None:
        """Encodes images of one kind and shape. After a lack of memory the rest of the group is encoded in batches of
        half the size, down to one image; after any other exception the halves of that batch are tried alone."""
        limit, runs = self.batch_images, [group]
        while runs:
            run = runs.pop()
            if len(run) > limit:
                runs.append(run[limit:])
                run = run[:limit]
            error = self._try(run, done)
            if error is None:
                continue
            no_memory = _is_lack_of_memory(error)
            del error  # with it the frames that hold the batch's tensors
            if no_memory and self.device.type == "cuda":
                torch.cuda.empty_cache()
            half = (len(run) + 1) // 2
            if len(run) == 1:
                done.failed[run[0].key] = NO_MEMORY if no_memory else NOT_ENCODED
                continue
            limit = half if no_memory else limit
            runs += [run[half:], run[:half]]

    def _try(self, run: list[StagedImage], done: Encoded) -> Exception | None:
        try:
            features = self._forward(run)
            # Copies: rows of one tensor would keep all of it until the last of them is dropped.
            rows = {image.key: part.clone() for image, part in zip(run, features, strict=True)}
            finite = dict(zip(rows, features.isfinite().flatten(1).all(dim=1).unbind(), strict=True))
        except Exception as error:
            _log.warning("encoding of %s failed", ", ".join(image.key for image in run), exc_info=True)
            return error
        done.features.update(rows)
        done.finite.update(finite)
        return None

    def _forward(self, run: list[StagedImage]) -> torch.Tensor:
        kind, arrays = run[0].kind, [image.array for image in run]
        if kind == "coded_pixels":
            batch = decode_pixels(self._to_device(arrays, torch.uint8)).to(self.dtype)
        else:
            batch = self._to_device(arrays, torch.float32).to(self.dtype)
        # torch lets cuDNN round a float32 convolution's operands to TF32; asked for float32, we mean it.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=self.dtype != torch.float32):
            if kind == "image_features":
                return self.vision.project_features(batch)
            return self.vision.encode_pixels(batch)

    def _to_device(self, arrays: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        """One copy into memory of our own, pinned where a GPU reads it while the host goes on."""
        shape = (len(arrays), *arrays[0].shape[1:])
        host = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        np.concatenate(arrays, out=host.numpy(), casting="same_kind")
        return host.to(self.device, non_blocking=True)

    def _fail_what_is_not_finite(self, done: Encoded) -> None:
        """For all images at once: on a GPU the host waits here and nowhere before."""
        flags = torch.stack(list(done.finite.values())).tolist() if done.finite else []
        for key, is_finite in zip(done.finite, flags, strict=True):
            if not is_finite:
                _log.warning("image %s: its features are not finite numbers", key)
                del done.features[key]
                done.failed[key] = NOT_FINITE


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether an allocation failed. On a CPU, and where a CUDA library allocates, only the message tells."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    told = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)
