import dataclasses

import pytest
import torch
from PIL import Image

from dist_vlm.config import VisionConfig
from dist_vlm.engine.images import ImagePreparer
from dist_vlm.multimodal.image import ImageFeatureData, ImagePixelData


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
