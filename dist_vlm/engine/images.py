"""A request's images: each checked, preprocessed, and named by its content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dist_vlm.engine.object_locks import ObjectLocks
from dist_vlm.executor.base import StageKind
from dist_vlm.media import PictureError, content_key, to_rgb
from dist_vlm.multimodal.image import ImageFeatureData, ImagePixelData
from dist_vlm.workers.coded_pixels import coded_shape

if TYPE_CHECKING:
    from dist_vlm.config import VisionConfig
    from dist_vlm.workers.models import ModelSpec
    from dist_vlm.workers.models.family import ImageProcessor


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image ready to be staged: see `EngineImage`."""

    key: str
    kind: StageKind
    array: np.ndarray


class ImagePreparer:
    """Turns what a caller gave as images into arrays of the model's shapes. Safe for use from several threads.

    processor: None if only tensors are accepted.
    """

    def __init__(self, *, spec: ModelSpec, vision: VisionConfig, processor: ImageProcessor | None) -> None:
        self._spec = spec
        self._vision = vision
        self._processor = processor
        self._decoding = ObjectLocks()

    def listed(self, data: Any) -> list[Any]:
        """A prompt's `multi_modal_data` as a list, its number checked. Raises `ValueError`."""
        images = _as_list(data)
        if images and self._spec.image_token_id is None:
            raise ValueError("multi_modal_data: this model takes no images")
        limit = self._vision.max_images_per_prompt
        if len(images) > limit:
            raise ValueError(f"multi_modal_data has {len(images)} images; at most {limit} are allowed")
        return images

    def prepare(self, images: Sequence[Any], *, helpers: Executor | None = None) -> list[PreparedImage]:
        """All images of one prompt, in order. Raises `ValueError` naming what is wrong with which.

        helpers: threads that may take parts of the work, as `run_beside` says.
        """
        return [self._prepare_one(image, f"image {index}", helpers) for index, image in enumerate(images)]

    def _prepare_one(self, image: Any, name: str, helpers: Executor | None) -> PreparedImage:
        if isinstance(image, PreparedImage):
            return self._prepared(image, name)
        if isinstance(image, ImageFeatureData):
            return self._features(image.image_features, name)
        if isinstance(image, ImagePixelData):
            image = image.image
        if isinstance(image, Image.Image):
            return self.preprocessed(self.decoded(image, name), helpers=helpers)
        if _is_tensor(image):
            return self._pixels(image, name)
        raise ValueError(
            f"{name} of type {type(image).__name__}: must be a PIL picture, an ImagePixelData or an ImageFeatureData"
        )

    def decoded(self, picture: Image.Image, name: str) -> Image.Image:
        """The picture in RGB, as people see it. Raises `ValueError` if pictures are not accepted, a `PictureError` if
        this one cannot be used."""
        self._accept("pixel_values", name)
        if self._processor is None:
            raise ValueError(f"{name} is a picture, but disable_image_processor is set: pass preprocessed pixel values")
        self._check_aspect(picture, name)
        # PIL decodes a picture when it is first used; two requests with the same one must not do so at the same time.
        with self._decoding.holding(picture):
            return to_rgb(picture, max_pixels=self._vision.max_image_pixels, name=name)

    def preprocessed(self, rgb: Image.Image, *, helpers: Executor | None = None) -> PreparedImage:
        """What `decoded` gave, as the model takes it."""
        assert self._processor is not None
        array = self._processor.preprocess(rgb, helpers=helpers)
        key = content_key(array, settings=self._processor.digest)
        return PreparedImage(key, "coded_pixels" if array.dtype == np.uint8 else "pixel_values", array)

    def _check_aspect(self, picture: Image.Image, name: str) -> None:
        """Processors scale the shorter side to the model's before they crop: a thin picture grows without bound."""
        assert self._spec.image_input_shape is not None
        target, (shorter, longer) = max(self._spec.image_input_shape[2:]), sorted(picture.size)
        limit = self._vision.max_image_pixels
        if shorter and longer / shorter * target * target > limit:
            raise PictureError(
                f"{name}: {picture.size[0]}x{picture.size[1]} is {longer / shorter:.0f} times longer than wide; scaled "
                f"for the model it has more than max_image_pixels = {limit}, which allows {limit // target**2} times"
            )

    def _prepared(self, image: PreparedImage, name: str) -> PreparedImage:
        self._accept(image.kind, name)
        expected, dtype = self._shape(image.kind), "uint8" if image.kind == "coded_pixels" else "float32"
        if image.array.shape != expected or image.array.dtype != dtype:
            raise ValueError(
                f"{name}: prepared {image.kind} have shape {image.array.shape} and dtype {image.array.dtype}; must be "
                f"{expected} and {dtype}"
            )
        return image

    def _pixels(self, tensor: Any, name: str) -> PreparedImage:
        self._accept("pixel_values", name)
        array = _to_array(tensor, self._shape("pixel_values"), f"{name}: pixel values")
        return PreparedImage(content_key(array, settings="pixel_values"), "pixel_values", array)

    def _features(self, tensor: Any, name: str) -> PreparedImage:
        self._accept("image_features", name)
        if not _is_tensor(tensor):
            raise ValueError(f"{name}: image_features of type {type(tensor).__name__}: must be a tensor")
        array = _to_array(tensor, self._shape("image_features"), f"{name}: image_features")
        return PreparedImage(content_key(array, settings="image_features"), "image_features", array)

    def _shape(self, kind: StageKind) -> tuple[int | None, ...]:
        """Of one image's array."""
        if kind == "image_features":
            return (1, self._spec.image_feature_size, self._spec.image_feature_width)
        assert self._spec.image_input_shape is not None
        shape = tuple(self._spec.image_input_shape)
        return coded_shape(shape) if kind == "coded_pixels" else shape

    def _accept(self, kind: StageKind, name: str) -> None:
        only, stage = self._vision.image_input_type, "pixel_values" if kind == "coded_pixels" else kind
        if only is not None and stage != only:
            raise ValueError(f"{name} enters as {stage}, but image_input_type = {only!r} allows no other than that")


def _as_list(data: Any) -> list[Any]:
    if data is None:
        return []
    if isinstance(data, (ImagePixelData, ImageFeatureData)):
        return [data]
    if not isinstance(data, Mapping):
        raise ValueError(
            f"multi_modal_data of type {type(data).__name__}: must be an ImagePixelData, an ImageFeatureData, or a "
            "mapping like {'image': picture}"
        )
    unknown = [key for key in data if key != "image"]
    if unknown:
        raise ValueError(f"multi_modal_data has the key {unknown[0]!r}: only 'image' is served")
    images = data.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _is_tensor(value: Any) -> bool:
    import torch  # a caller that has a tensor has imported it already; one that has not pays nothing at start

    return isinstance(value, torch.Tensor)


def _to_array(tensor: Any, expected: tuple[int | None, ...], name: str) -> np.ndarray:
    """A float32 copy of exactly the shape `expected`; the first axis, of size 1, may be missing."""
    actual = tuple(tensor.shape)
    if actual not in (expected, expected[1:]):
        raise ValueError(f"{name} have shape {actual}; must be {expected} or {expected[1:]}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} have dtype {tensor.dtype}; must be a floating-point type")
    array: np.ndarray = tensor.detach().float().cpu().numpy().reshape(expected).copy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold NaN or infinity; must be finite")
    return array
