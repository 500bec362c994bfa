"""Pixel values against the processor that `AutoImageProcessor` loads in its PIL backend."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dist_vlm.workers.coded_pixels import decoded
from dist_vlm.workers.models import CheckpointError, get_family, read_spec


@pytest.fixture(autouse=True)
def _nothing_is_known(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def processor(path, other=None):
    spec = read_spec(str(path))
    return get_family(spec.family).image_processor(spec, other)


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def directory(tiny_facts, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(tiny_facts / name, tmp_path / name)
    return tmp_path


SIZES = [(56, 56), (200, 90), (31, 77), (1, 1), (3, 400)]


def expected_pixels(image, size=56):
    """Bicubic to `size` on the shorter side, the middle square, scaled to [0, 1], minus mean, over deviation."""
    scale = size / min(image.size)
    resized = image.resize(tuple(max(size, int(side * scale)) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in resized.size)
    values = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return ((values - mean) / deviation).transpose(2, 0, 1)[None]


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_formula(tiny_facts, size) -> None:
    actual = decoded(processor(tiny_facts).preprocess(picture(*size)))
    assert (actual.dtype, actual.shape) == (np.float32, (1, 3, 56, 56))
    np.testing.assert_allclose(actual, expected_pixels(picture(*size)), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_auto_image_processor(tiny_facts, size) -> None:
    from transformers import AutoImageProcessor

    try:
        auto = AutoImageProcessor.from_pretrained(tiny_facts, backend="pil")
    except ImportError:
        pytest.skip("the auto class of this transformers asks for torchvision")
    expected = auto(images=picture(*size), return_tensors="np")["pixel_values"]
    assert np.array_equal(decoded(processor(tiny_facts).preprocess(picture(*size))), expected)


def test_settings_inside_processor_config_are_read_too(directory) -> None:
    """transformers 5 saves the image processor's settings inside processor_config.json."""
    expected = processor(directory)
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    actual = processor(directory)
    assert actual.digest == expected.digest
    assert np.array_equal(actual.preprocess(picture(60, 80)), expected.preprocess(picture(60, 80)))


def change(directory, **fields):
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_digest_names_the_settings(directory) -> None:
    before = processor(directory).digest
    assert processor(directory).digest == before
    change(directory, image_mean=[0.5, 0.5, 0.5])
    assert processor(directory).digest != before


def test_another_directory_can_be_named(directory, tiny_facts) -> None:
    change(directory, image_mean=[0.5, 0.5, 0.5])
    assert processor(tiny_facts, str(directory)).digest == processor(directory).digest


def test_the_padding_processor_is_served(directory) -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    change(directory, image_processor_type="LlavaImageProcessorFast", do_pad=True)
    own = LlavaImageProcessorPil.from_pretrained(directory)
    expected = own(images=picture(90, 40), return_tensors="np")["pixel_values"]
    assert np.array_equal(processor(directory).preprocess(picture(90, 40)), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'SiglipImageProcessor', must be"),
        ({"image_processor_type": None}, "image_processor_type is None, must be CLIPImageProcessor or"),
        ({"crop_size": {"height": 42, "width": 42}}, r"gives shape \[1, 3, 42, 42\], the vision tower takes"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(directory, fields, message) -> None:
    change(directory, **fields)
    with pytest.raises(CheckpointError, match=message):
        processor(directory)


def test_missing_settings_are_named(directory) -> None:
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="preprocessor_config.json is missing, and processor_config.json has no"):
        processor(directory)


def test_the_pil_backend_is_pinned(tiny_facts) -> None:
    """Not what `AutoImageProcessor` picks where torchvision is installed."""
    from transformers.image_processing_backends import PilBackend

    assert isinstance(processor(tiny_facts)._processor, PilBackend)
