"""Every expectation is a formula on the samples that the test itself wrote."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import product

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from dist_vlm.media import PictureError, to_rgb
from dist_vlm.media.rgb import UnclearColours, as_rgb

WHITE = [255, 255, 255]


def saved(picture, kind="PNG", **options):
    """The picture as it comes from a file."""
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return Image.open(io.BytesIO(data.getvalue()))


def rgb_of(picture):
    rgb = to_rgb(picture)
    assert rgb.mode == "RGB"
    assert "transparency" not in rgb.info  # an image processor would apply it again
    return np.asarray(rgb)


def grey_of(picture):
    rgb = rgb_of(picture)
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


def over_white(colours, alpha):
    exact = (colours.astype(float) * alpha + 255.0 * (255 - alpha.astype(float))) / 255
    return np.floor(exact + 0.5).astype(np.uint8)


def png(size, depth, colour_type, rows, **chunks):
    """A PNG whose rows are packed already."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0))
    others = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + others + body + chunk(b"IEND", b"")))


def tiff(size, data, *, bits, photometric=1, sample_format=1):
    """An uncompressed little-endian TIFF of one sample a pixel."""
    tags = [(256, 3, size[0]), (257, 3, size[1]), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
            (277, 3, 1), (278, 3, size[1]), (279, 4, len(data)), (339, 3, sample_format)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return Image.open(io.BytesIO(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory))


GRID = np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1).astype(np.uint8)
COLOUR, ALPHA = GRID[..., 0], GRID[..., 1]


# ------------------------------------------------------------------------------------------ RGB, grey, palette, CMYK


def test_rgb_is_taken_as_it_is_and_not_held_twice():
    picture = Image.effect_noise((16, 9), 90).convert("RGB")
    assert to_rgb(picture) is picture


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_grey_and_two_levels_keep_their_values(kind):
    np.testing.assert_array_equal(grey_of(saved(Image.fromarray(COLOUR), kind)), COLOUR)
    bits = COLOUR > ALPHA
    np.testing.assert_array_equal(grey_of(saved(Image.fromarray(bits), kind)), np.where(bits, 255, 0))


@pytest.mark.parametrize("depth", [2, 4])
def test_grey_of_few_bits_reaches_from_black_to_white(depth):
    values = np.arange(2**depth)
    packed = np.packbits(((values[:, None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8)).tobytes()
    np.testing.assert_array_equal(grey_of(png((2**depth, 1), depth, 0, [packed]))[0], values * 255 // (2**depth - 1))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_gives_its_colours(kind):
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    picture = Image.fromarray(COLOUR)
    picture.putpalette(palette.tobytes())
    assert picture.mode == "P"
    np.testing.assert_array_equal(rgb_of(saved(picture, kind)), palette[COLOUR])


def cmyk_colours(cmyk):
    """Each ink takes its part of the light."""
    ink = cmyk.astype(float) / 255
    return 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])


def test_cmyk_is_ink_on_white():
    cmyk = np.random.default_rng(1).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    expected = cmyk_colours(cmyk)
    assert np.abs(rgb_of(saved(Image.fromarray(cmyk, "CMYK"), "TIFF")) - expected).max() <= 1
    # A JPEG of eight by eight equal pixels is exact but for rounding. Adobe's, as all, keep the light, not the ink.
    flat = np.kron(cmyk[:4, :4], np.ones((16, 16, 1), np.uint8))
    jpeg = saved(Image.fromarray(flat, "CMYK"), "JPEG", quality=100, subsampling=0)
    assert jpeg.info["adobe_transform"] == 0
    assert np.abs(rgb_of(jpeg) - cmyk_colours(flat)).max() <= 4


def test_ycck_is_cmyk_in_other_terms():
    """Planes of luma, chroma and black, and a mark in the file that says that this is what they are."""
    inks = np.random.default_rng(2).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    flat = np.kron(inks, np.ones((16, 16, 1), np.uint8))
    light = 255 - flat
    # libjpeg turns YCC into the light of three inks, and keeps the fourth: what is stored is light, Adobe's way.
    ycc = np.asarray(Image.fromarray(255 - light[..., :3], "RGB").convert("YCbCr"))
    stored = np.dstack([ycc, light[..., 3]])
    data = io.BytesIO()
    Image.fromarray(255 - stored, "CMYK").save(data, "JPEG", quality=100, subsampling=0)
    raw = bytearray(data.getvalue())
    at = raw.index(b"Adobe") + 11
    assert raw[at] == 0
    raw[at] = 2
    picture = Image.open(io.BytesIO(raw))
    assert (picture.mode, picture.info["adobe_transform"]) == ("CMYK", 2)
    # C = 255 - R(YCC) as stored; that is light, so the ink is R(YCC), which is 255 - light.
    expected = cmyk_colours(np.dstack([255 - light[..., :3], flat[..., 3]]))
    assert np.abs(rgb_of(picture).astype(float) - expected).max() <= 4


# ------------------------------------------------------------------------------------------------------ transparency


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_what_is_transparent_is_seen_over_white(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    colours = np.dstack([COLOUR, 255 - COLOUR, COLOUR.T])
    picture = saved(Image.fromarray(np.dstack([colours, ALPHA])), kind, **options)
    assert picture.mode == "RGBA"
    np.testing.assert_array_equal(rgb_of(picture), over_white(colours, ALPHA[..., None]))


def test_grey_with_alpha_is_seen_over_white():
    picture = saved(Image.merge("LA", [Image.fromarray(COLOUR), Image.fromarray(ALPHA)]))
    assert picture.mode == "LA"
    np.testing.assert_array_equal(grey_of(picture), over_white(COLOUR, ALPHA))


def test_an_opaque_alpha_channel_changes_nothing():
    rgb = Image.effect_noise((20, 20), 80).convert("RGB")
    np.testing.assert_array_equal(rgb_of(saved(rgb.convert("RGBA"))), np.asarray(rgb))


def test_premultiplied_colours_are_told_apart():
    premultiplied = Image.frombytes("RGBa", (2, 1), bytes([100, 50, 0, 128, 0, 0, 0, 0]))
    # What is left of the light of white is added: c + 255 - a, but for rounding.
    rgb = rgb_of(premultiplied)
    assert np.abs(rgb[0, 0].astype(int) - [227, 177, 127]).max() <= 1
    assert rgb[0, 1].tolist() == WHITE


@pytest.mark.parametrize("alpha", [bytes([0, 64, 255, 200]), bytes([0]), bytes([255, 255, 255, 0])])
def test_a_palette_with_alpha_is_seen_over_white(alpha):
    palette = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 0], [90, 90, 250]], np.uint8)
    indexes = np.array([[0, 1, 2, 3]], np.uint8)
    picture = Image.fromarray(indexes)
    picture.putpalette(palette.tobytes())
    known = np.frombuffer(alpha.ljust(4, b"\xff"), np.uint8)
    expected = over_white(palette[indexes], known[indexes][..., None])
    np.testing.assert_array_equal(rgb_of(saved(picture, transparency=alpha)), expected)
    np.testing.assert_array_equal(rgb_of(saved(picture).convert("PA")), palette[indexes])


def test_a_gif_shows_white_where_it_has_no_pixel():
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    picture.putpalette(bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
    assert rgb_of(saved(picture, "GIF", transparency=1)).tolist() == [[[255, 0, 0], WHITE, [0, 0, 255]]]


def test_a_transparent_colour_is_white_and_no_other_is():
    rgb = np.array([[[1, 2, 3], [1, 2, 4], [3, 2, 1]]], np.uint8)
    assert rgb_of(saved(Image.fromarray(rgb), transparency=(1, 2, 3))).tolist() == [[WHITE, [1, 2, 4], [3, 2, 1]]]
    grey = np.array([[0, 77, 78]], np.uint8)
    assert grey_of(saved(Image.fromarray(grey), transparency=77)).tolist() == [[0, 255, 78]]
    bits = np.array([[False, True]])
    assert grey_of(saved(Image.fromarray(bits), transparency=0)).tolist() == [[255, 255]]


def test_a_transparent_colour_is_meant_in_the_files_depth():
    two_bits = png((4, 1), 2, 0, [bytes([0b00011011])], tRNS=struct.pack(">H", 1))
    assert grey_of(two_bits).tolist() == [[0, 255, 170, 255]]
    four_bits = png((4, 1), 4, 0, [bytes([0x01, 0x23])], tRNS=struct.pack(">H", 2))
    assert grey_of(four_bits).tolist() == [[0, 17, 255, 51]]
    sixteen = png((3, 1), 16, 0, [struct.pack(">3H", 0, 2570, 2571)], tRNS=struct.pack(">H", 2570))
    assert grey_of(sixteen).tolist() == [[0, 255, 10]]
    colour = png(
        (2, 1), 16, 2, [struct.pack(">6H", 256, 512, 768, 256, 512, 1024)], tRNS=struct.pack(">3H", 256, 512, 768)
    )
    assert rgb_of(colour).tolist() == [[WHITE, [1, 2, 4]]]


def test_transformers_sees_the_same():
    rng = np.random.default_rng(3)
    rgba = Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8))
    quantized = saved(rgba.convert("RGB").quantize(16), transparency=bytes(rng.integers(0, 256, 16, dtype=np.uint8)))
    key = rgba.convert("RGB").getpixel((0, 0))
    for picture in (rgba, rgba.convert("LA"), quantized, saved(rgba.convert("RGB"), transparency=key)):
        np.testing.assert_array_equal(convert_to_rgb(picture, return_numpy=True), rgb_of(picture))


# ------------------------------------------------------------------------------------------------------ deep samples

ALL_16_BIT = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    picture = saved(Image.fromarray(ALL_16_BIT), kind)
    np.testing.assert_array_equal(grey_of(picture), np.rint(ALL_16_BIT / 257))


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "=i4")])
def test_16_bit_grey_is_scaled_whatever_its_order(mode, dtype):
    picture = Image.frombytes(mode, (256, 256), ALL_16_BIT.astype(dtype).tobytes())
    np.testing.assert_array_equal(grey_of(picture), np.rint(ALL_16_BIT / 257))


def test_16_bit_colours_keep_their_high_byte():
    values = np.random.default_rng(4).integers(0, 65536, (5, 6, 3))
    picture = png((6, 5), 16, 2, [row.astype(">u2").tobytes() for row in values])
    np.testing.assert_array_equal(rgb_of(picture), values >> 8)


@pytest.mark.parametrize("photometric", [0, 1])
def test_a_tiff_may_begin_with_white(photometric):
    sixteen = tiff((256, 256), ALL_16_BIT.tobytes(), bits=16, photometric=photometric)
    eight = tiff((256, 256), COLOUR.tobytes(), bits=8, photometric=photometric)
    for picture, grey in ((sixteen, np.rint(ALL_16_BIT / 257)), (eight, COLOUR)):
        np.testing.assert_array_equal(grey_of(picture), grey if photometric else 255 - grey)


def test_12_bits_reach_to_white():
    picture = tiff((2, 2), bytes([0xFF, 0xF8, 0x00, 0x00, 0x0F, 0xFF]), bits=12)
    np.testing.assert_array_equal(grey_of(picture), np.rint(np.array([[4095, 2048], [0, 4095]]) * 255 / 4095))


def test_32_bit_grey_must_fit_16():
    data = np.array([[0, 257, 65535]], np.int32)
    assert grey_of(tiff((3, 1), data.tobytes(), bits=32)).tolist() == [[0, 1, 255]]
    for wrong, shown in (([[0, 65536]], "0 .. 65536"), ([[-3, 9]], "-3 .. 9")):
        picture = Image.frombytes("I", (2, 1), np.array(wrong, np.int32).tobytes())
        with pytest.raises(PictureError, match=rf"^image: its samples are in {shown}; grey must be in 0 .. 65535$"):
            to_rgb(picture)


def test_floating_point_grey_must_be_between_0_and_1():
    values = np.linspace(0, 1, 1021, dtype=np.float32)[None]
    picture = tiff((1021, 1), values.tobytes(), bits=32, sample_format=3)
    assert picture.mode == "F"
    assert np.abs(grey_of(picture) - values * 255).max() <= 0.5001
    for wrong in (1.5, -0.1, float("nan"), float("inf")):
        picture = Image.frombytes("F", (2, 1), np.array([[0.5, wrong]], np.float32).tobytes())
        with pytest.raises(PictureError, match="floating-point numbers, and not all in 0 .. 1"):
            to_rgb(picture)


def test_cielab_is_refused_by_name():
    with pytest.raises(UnclearColours, match="CIELAB, which is not served"):
        as_rgb(Image.new("LAB", (2, 2)))


# ------------------------------------------------------------------------------------------------- the first picture


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_of_several_frames_or_pages_the_first_is_shown(kind):
    red, green = (Image.new("RGB", (16, 16), colour) for colour in ("red", "lime"))
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = saved(red, kind, save_all=True, append_images=[green, red], **options)
    assert picture.n_frames == 3
    assert np.abs(rgb_of(picture).astype(int) - [255, 0, 0]).max() <= (2 if kind == "MPO" else 0)


def test_every_pair_of_a_mode_and_a_file_that_holds_it_is_shown():
    modes = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "YCbCr"]
    shown = set()
    for mode, kind in product(modes, ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]):
        try:
            picture = saved(Image.new(mode, (8, 8)), kind)
        except (OSError, ValueError):  # the file does not hold it
            continue
        assert rgb_of(picture).shape == (8, 8, 3)
        shown.add(mode)
    assert shown == set(modes)
