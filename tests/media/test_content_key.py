import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
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


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA", "I", "F"])
@pytest.mark.parametrize("size", [(0, 0), (1, 1), (701, 333), (200_001, 2), (9, 50_001)])
def test_a_picture_of_many_parts_is_named_by_all_its_bytes(mode, size):
    """Written out: the settings and the kind, each behind its length, then a digest of each half mebibyte of rows."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    picture = Image.fromarray(noise).convert(mode)
    whole = hashlib.blake2b(digest_size=16)
    for part in (b"settings", f"{mode} {size[0]}x{size[1]}".encode()):
        whole.update(len(part).to_bytes(8, "little") + part)
    rows = max(1, (1 << 19) // max(1, size[0] * len(picture.getbands())))
    for top in range(0, size[1], rows):
        data = picture.crop((0, top, size[0], min(size[1], top + rows))).tobytes()
        whole.update(hashlib.blake2b(data, digest_size=32, person=b"rows").digest())
    assert content_key(picture, settings="settings") == whole.hexdigest()
    with ThreadPoolExecutor(3) as helpers:
        assert content_key(picture, settings="settings", helpers=helpers) == whole.hexdigest()


@pytest.mark.parametrize("place", [(0, 0), (1023, 0), (0, 767), (1023, 767), (511, 170), (511, 171), (3, 511)])
def test_every_pixel_counts(place):
    picture = Image.new("RGB", (1024, 768), (1, 2, 3))
    before = content_key(picture, settings="")
    picture.putpixel(place, (1, 2, 4))
    assert content_key(picture, settings="") != before
