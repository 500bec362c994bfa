import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from dist_vlm.config import VisionConfig
from dist_vlm.engine.images import ImagePreparer, PreparedImage
from dist_vlm.media import PictureError
from dist_vlm.multimodal.image import ImageFeatureData, ImagePixelData
from dist_vlm.sampling import SamplingParams


def preparer(front, **changes):
    vision = VisionConfig(image_token_id=32000, image_input_shape=(1, 3, 56, 56), image_feature_size=16, **changes)
    return ImagePreparer(spec=front.spec, vision=vision, processor=None)


def test_image_input_type_allows_only_its_own_form(front):
    features, pixels = ImageFeatureData(torch.ones(1, 16, 64)), ImagePixelData(torch.ones(3, 56, 56))
    only_pixels = preparer(front, image_input_type="pixel_values")
    assert [image.kind for image in only_pixels.prepare([pixels])] == ["pixel_values"]
    with pytest.raises(ValueError, match="enters as image_features, but image_input_type = 'pixel_values'"):
        only_pixels.prepare([features])
    with pytest.raises(ValueError, match="enters as pixel_values, but image_input_type = 'image_features'"):
        preparer(front, image_input_type="image_features").prepare([pixels])


def test_without_a_processor_only_tensors_are_taken(front):
    with pytest.raises(ValueError, match="disable_image_processor is set"):
        preparer(front).prepare([Image.new("RGB", (9, 9))])


def test_a_model_without_images_takes_none(front):
    spec = dataclasses.replace(front.spec, image_token_id=None)
    text_only = ImagePreparer(spec=spec, vision=VisionConfig(), processor=None)
    assert text_only.listed(None) == []
    with pytest.raises(ValueError, match="takes no images"):
        text_only.listed({"image": Image.new("RGB", (9, 9))})


def test_the_array_is_a_copy_of_the_callers_tensor(front):
    tensor = torch.ones(3, 56, 56)
    (image,) = preparer(front).prepare([ImagePixelData(tensor)])
    tensor.zero_()
    assert image.array.min() == 1.0


# ---------------------------------------------------------------------------------------- images prepared elsewhere


def prepared(kind, shape, dtype=np.float32):
    return PreparedImage("0" * 32, kind, np.ones(shape, dtype))


# 19 rows of 56 bytes hold 256 numbers of 4.
FORMS = [
    ("coded_pixels", (1, 3, 19 + 56, 56), np.uint8, "pixel_values"),
    ("pixel_values", (1, 3, 56, 56), np.float32, "pixel_values"),
    ("image_features", (1, 16, 64), np.float32, "image_features"),
]


@pytest.mark.parametrize(("kind", "shape", "dtype", "stage"), FORMS)
def test_a_prepared_image_goes_through_as_it_is(front, kind, shape, dtype, stage):
    image = prepared(kind, shape, dtype)
    for setting in (None, stage):
        assert preparer(front, image_input_type=setting).prepare([image])[0] is image
    inputs = {"prompt": "<image>", "multi_modal_data": {"image": [image]}}
    (request,) = front.processor.process("r", inputs, SamplingParams()).requests
    assert request.images[0].array is image.array
    assert (request.images[0].span.image, request.images[0].kind) == (image.key, kind)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            prepared("pixel_values", (3, 56, 56)),
            r"image 0: prepared pixel_values have shape \(3, 56, 56\) and dtype float",
        ),
        (prepared("pixel_values", (1, 16, 64)), r"must be \(1, 3, 56, 56\) and float32"),
        (prepared("pixel_values", (1, 3, 56, 56), np.float64), "dtype float64; must be"),
        (prepared("image_features", (1, 3, 56, 56)), r"must be \(1, 16, 64\) and float32"),
        (prepared("coded_pixels", (1, 3, 56, 56), np.uint8), r"must be \(1, 3, 75, 56\) and uint8"),
        (prepared("coded_pixels", (1, 3, 75, 56)), "dtype float32; must be"),
    ],
)
def test_a_prepared_image_of_another_shape_is_refused(front, image, message):
    with pytest.raises(ValueError, match=message):
        preparer(front).prepare([image])


def test_image_input_type_holds_for_prepared_images_too(front):
    with pytest.raises(ValueError, match="enters as image_features, but image_input_type = 'pixel_values'"):
        preparer(front, image_input_type="pixel_values").prepare([prepared("image_features", (1, 16, 64))])
    for image in (prepared("pixel_values", (1, 3, 56, 56)), prepared("coded_pixels", (1, 3, 75, 56), np.uint8)):
        with pytest.raises(ValueError, match="enters as pixel_values, but image_input_type = 'image_features'"):
            preparer(front, image_input_type="image_features").prepare([image])


# --------------------------------------------------------------------------------------- pictures as people see them


def request_image(front, picture):
    inputs = {"prompt": "<image>", "multi_modal_data": {"image": picture}}
    return front.processor.process("r", inputs, SamplingParams()).requests[0].images[0]


def test_a_transparent_picture_is_prepared_as_the_one_that_is_seen(front):
    rgba = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8)
    colours, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255.0
    seen = Image.fromarray(np.floor(colours * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8))
    ours, theirs = request_image(front, Image.fromarray(rgba)), request_image(front, seen)
    assert ours.span.image == theirs.span.image
    np.testing.assert_array_equal(ours.array, theirs.array)


def test_a_transparent_colour_is_applied_once(front):
    """The image processor would take what is white already for another picture."""
    rgb = np.zeros((60, 80, 3), np.uint8)
    rgb[:30] = 255
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG", transparency=(0, 0, 0))
    ours, white = request_image(front, Image.open(file)), request_image(front, Image.new("RGB", (80, 60), "white"))
    assert ours.span.image == white.span.image
    np.testing.assert_array_equal(ours.array, white.array)


def test_the_callers_picture_is_left_as_it_was(front):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    picture.info["transparency"] = (1, 2, 3)
    before = picture.tobytes(), dict(picture.info)
    request_image(front, picture)
    assert (picture.tobytes(), picture.info) == before


def test_a_picture_too_thin_to_scale_is_a_picture_error(front):
    with pytest.raises(PictureError, match="is 25000 times longer than wide"):
        request_image(front, Image.new("RGB", (25_000, 1)))


def test_helpers_change_nothing(front):
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    inputs = {"prompt": "<image>", "multi_modal_data": {"image": picture}}
    alone = request_image(front, picture)
    with ThreadPoolExecutor(3) as helpers:
        (request,) = front.processor.process("r", inputs, SamplingParams(), helpers=helpers).requests
    assert request.images[0].span.image == alone.span.image
    np.testing.assert_array_equal(request.images[0].array, alone.array, strict=True)
