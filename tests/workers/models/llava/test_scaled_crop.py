"""Pixel values against transformers' own processor, to the last bit, and which settings it is left to."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dist_vlm.workers.coded_pixels import decoded
from dist_vlm.workers.models.llava import scaled_crop as module
from dist_vlm.workers.models.llava.scaled_crop import scaled_crop


def made(kind: Any = CLIPImageProcessorPil, edge: int = 336, **settings: Any) -> Any:
    sizes = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    return kind(**sizes | settings)


def picture(width: int, height: int) -> Image.Image:
    """Noise: every pixel shows."""
    values = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def expected(processor: Any, image: Image.Image) -> np.ndarray:
    values: np.ndarray = processor(images=image, return_tensors="np")["pixel_values"]
    return values


SIZES = [
    (336, 336), (640, 480), (480, 640), (1024, 768), (400, 1000), (1, 1), (337, 336), (335, 336), (641, 479), (7, 500),
    (500, 7), (1921, 1080), (100, 100),
    (500, 336), (336, 500), (1081, 1922), (1922, 1081), (1920, 1080), (1080, 1920), (799, 533), (3000, 2), (67, 66),
    (1280, 960), (2047, 1536), (672, 672), (672, 500), (130, 131),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers_for_every_shape_of_picture(size: tuple[int, int]) -> None:
    processor = made()
    ours = scaled_crop(processor)
    assert ours is not None
    coded = ours(picture(*size))
    np.testing.assert_array_equal(decoded(coded), expected(processor, picture(*size)), strict=True)
    for bands in (1, 2, 3, 4, 9) if ours.has_bands(picture(*size)) else ():
        np.testing.assert_array_equal(ours.in_bands(picture(*size), bands, None), coded, strict=True)
    with ThreadPoolExecutor(2) as helpers:
        np.testing.assert_array_equal(ours(picture(*size), helpers=helpers), coded, strict=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 2.0, 3.0]},
        {"image_mean": 0.5, "image_std": 0.5},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"crop_size": {"height": 33, "width": 28}},
        {"resample": Image.Resampling.BILINEAR},
        {"resample": Image.Resampling.LANCZOS},
        {"resample": Image.Resampling.HAMMING},
        {"resample": Image.Resampling.BOX},
        {"resample": Image.Resampling.NEAREST},
        {"kind": LlavaImageProcessorPil, "do_pad": False},
    ],
    ids=str,
)
def test_equals_transformers_for_every_setting_it_serves(settings: dict[str, Any]) -> None:
    processor = made(edge=56, **settings)
    ours = scaled_crop(processor)
    assert ours is not None
    for size in ((80, 60), (31, 77)):
        np.testing.assert_array_equal(decoded(ours(picture(*size))), expected(processor, picture(*size)))
        if ours.has_bands(picture(*size)):
            coded = ours.in_bands(picture(*size), 4, None)
            np.testing.assert_array_equal(decoded(coded), expected(processor, picture(*size)))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": LlavaImageProcessorPil, "do_pad": True},
        {"size": {"height": 56, "width": 56}},
        {"size": {"shortest_edge": 56, "longest_edge": 90}},
        {"crop_size": {"height": 57, "width": 56}},
        {"do_center_crop": False},
        {"do_resize": False},
    ],
    ids=str,
)
def test_other_steps_are_left_to_transformers(settings: dict[str, Any]) -> None:
    assert scaled_crop(made(edge=56, **settings)) is None


def test_a_transformers_that_does_more_is_noticed_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    class Flipped(CLIPImageProcessorPil):
        def resize(self, image: np.ndarray, *args: Any, **others: Any) -> np.ndarray:
            resized: np.ndarray = super().resize(image, *args, **others)[:, :, ::-1]
            return resized

    with caplog.at_level(logging.WARNING, module.__name__):
        assert scaled_crop(made(Flipped)) is None
    assert "something unforeseen" in caplog.text
