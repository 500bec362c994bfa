"""Coded pictures against the table and the pixels that they were made of."""

import numpy as np
import pytest
import torch

from dist_vlm.workers.coded_pixels import blank_coded, coded_shape, decode_pixels, decoded, places_of


def coded(seed, height, width, channels=3):
    """A coded picture, and its pixel values looked up one by one."""
    random = np.random.default_rng(seed)
    table = random.standard_normal((channels, 256)).astype(np.float32)
    pixels = random.integers(0, 256, (channels, height, width), dtype=np.uint8)
    made = blank_coded(table, height=height, width=width)
    places_of(made)[0] = pixels
    values = [[[table[channel, place] for place in row] for row in pixels[channel]] for channel in range(channels)]
    return made, np.array([values], np.float32)


SIZES = [(7, 5), (3, 256), (3, 1024), (2, 1500), (1, 1), (40, 33)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_decoded_by_its_own_table(size, channels):
    pictures = [coded(seed, *size, channels) for seed in range(3)]
    values = np.concatenate([expected for _, expected in pictures])
    assert all(made.shape == coded_shape(expected.shape) for made, expected in pictures)
    for made, expected in pictures:
        np.testing.assert_array_equal(decoded(made), expected, strict=True)
    together = decode_pixels(torch.from_numpy(np.concatenate([made for made, _ in pictures])))
    np.testing.assert_array_equal(together.numpy(), values, strict=True)


def test_a_part_of_a_larger_tensor_is_decoded_too():
    made, expected = coded(0, 9, 100)
    spread = torch.zeros(2, *made.shape[1:3], 201, dtype=torch.uint8)[..., 1::2]
    spread[1] = torch.from_numpy(made[0])
    np.testing.assert_array_equal(decode_pixels(spread)[1:].numpy(), expected)


@pytest.mark.parametrize("tensor", [torch.zeros(1, 3, 30, 40), torch.zeros(1, 3, 25, 40, dtype=torch.uint8)])
def test_what_is_no_coded_picture_is_refused(tensor):
    with pytest.raises(ValueError, match=r"must be uint8 with 26 rows of table"):
        decode_pixels(tensor)
