import hashlib

import numpy as np
import pytest

from dist_vlm.media import content_key


def test_whatever_changes_the_features_changes_the_key():
    data = bytes(range(24)) * 3
    keys = [
        content_key(np.frombuffer(data, np.uint8), settings="s"),
        content_key(np.frombuffer(data, np.uint8), settings="t"),
        content_key(np.frombuffer(data, np.uint8).reshape(6, 12), settings="s"),
        content_key(np.frombuffer(data, np.uint8).reshape(12, 6), settings="s"),
        content_key(np.frombuffer(data, np.int16), settings="s"),
    ]
    assert len(set(keys)) == len(keys)


def test_an_array_is_named_by_its_values_not_its_strides():
    array = np.arange(12.0).reshape(3, 4)
    assert content_key(array, settings="") == content_key(np.asfortranarray(array), settings="")


@pytest.mark.parametrize("shape", [(1, 3, 340, 336), (1, 0, 5), (2, 2)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_it_is_the_digest_of_settings_kind_and_bytes(shape, dtype):
    """Written out: the settings and the kind, each behind its length, then all bytes."""
    array = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    kind = f"{dtype} {shape}".encode()
    parts = [
        len(b"settings").to_bytes(8, "little"),
        b"settings",
        len(kind).to_bytes(8, "little"),
        kind,
        array.tobytes(),
    ]
    assert content_key(array, settings="settings") == hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (0, 0, 339, 335), (0, 2, 0, 0), (0, 2, 339, 335), (0, 1, 170, 168)])
def test_every_value_counts(place):
    array = np.full((1, 3, 340, 336), 7, np.uint8)
    before = content_key(array, settings="")
    array[place] ^= 1
    assert content_key(array, settings="") != before
