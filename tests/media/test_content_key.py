import numpy as np
from PIL import Image

from dist_vlm.media import content_key


def test_same_content_same_key():
    picture = Image.new("RGB", (6, 4), (1, 2, 3))
    assert content_key(picture, settings="s") == content_key(picture.copy(), settings="s")


def test_whatever_changes_the_features_changes_the_key():
    data = bytes(range(24)) * 3
    keys = [
        content_key(Image.frombytes("RGB", (6, 4), data), settings="s"),
        content_key(Image.frombytes("RGB", (4, 6), data), settings="s"),
        content_key(Image.frombytes("L", (18, 4), data), settings="s"),
        content_key(Image.frombytes("RGB", (6, 4), data), settings="t"),
        content_key(np.frombuffer(data, np.uint8), settings="s"),
        content_key(np.frombuffer(data, np.uint8).reshape(6, 12), settings="s"),
        content_key(np.frombuffer(data, np.int16), settings="s"),
    ]
    assert len(set(keys)) == len(keys)


def test_an_array_is_named_by_its_values_not_its_strides():
    array = np.arange(12.0).reshape(3, 4)
    assert content_key(array, settings="") == content_key(np.asfortranarray(array), settings="")
