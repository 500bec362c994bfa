from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dist_vlm.media import PictureError, to_rgb
from dist_vlm.media.picture_source import check_length, open_data_url, open_file


def noise(size=(7, 5)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(picture, kind="PNG"):
    data = io.BytesIO()
    picture.save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:image/PNG;Base64,", "data:image/svg+xml;base64,"])
def test_the_pixels_are_those_that_were_encoded_whatever_the_url_says_they_are(head):
    picture = open_data_url(head + encoded(noise()), name="it")
    np.testing.assert_array_equal(np.asarray(to_rgb(picture)), np.asarray(noise()))


def test_a_url_may_come_as_the_bytes_of_its_text():
    url = ("data:image/png;base64," + encoded(noise())).encode()
    for source in (url, bytearray(url)):
        np.testing.assert_array_equal(np.asarray(to_rgb(open_data_url(source, name="it"))), np.asarray(noise()))


def test_a_file_is_opened_as_it_is():
    data = base64.b64decode(encoded(noise()))
    np.testing.assert_array_equal(np.asarray(to_rgb(open_file(data, name="it"))), np.asarray(noise()))
    with pytest.raises(PictureError, match=f"it: {len(data)} bytes; at most {len(data) - 1} are allowed"):
        open_file(data, name="it", max_bytes=len(data) - 1)
    with pytest.raises(PictureError, match="it: 7x5 is 35 pixels; at most 34 are allowed"):
        open_file(data, name="it", max_pixels=34)
    with pytest.raises(PictureError, match="it: not a picture"):
        open_file(b"", name="it")


@pytest.mark.parametrize("size", [100, 101, 102])
def test_no_source_that_is_short_enough_is_found_too_long(size):
    longest_head = "data:image/vnd.ms-photo+x;base64,"
    check_length(longest_head + base64.b64encode(bytes(size)).decode(), name="it", max_bytes=size)
    check_length(bytes(size), name="it", max_bytes=size)
    with pytest.raises(PictureError, match=f"it: about {size} bytes; at most {size - 1} are allowed"):
        check_length(bytes(size), name="it", max_bytes=size - 1)
    with pytest.raises(PictureError, match=rf"it: about \d+ bytes; at most {size} are allowed"):
        check_length("data:image/png;base64," + base64.b64encode(bytes(size + 64)).decode(), name="it", max_bytes=size)


def test_nothing_is_decoded_on_opening():
    """A picture of 50 million pixels, cut off behind its header, opens; only its pixels are missing."""
    data = io.BytesIO()
    Image.new("1", (10_000, 5_000)).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()[:100]).decode()
    picture = open_data_url(url, name="it")
    assert picture.size == (10_000, 5_000)
    with pytest.raises(PictureError, match="damaged or truncated"):
        to_rgb(picture)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://a/b.png", "it: must begin like data:image/png;base64,"),
        ("data:text/plain;base64,aGk=", "must begin like"),
        ("data:image/png,rawbytes", "must begin like"),
        ("data:image/png;charset=utf-8;base64,aGk=", "must begin like"),
        ("", "must begin like"),
        ("data:image/png;base64,", "not a picture"),
        ("data:image/png;base64,aGk=", "not a picture, or of a format that is not served"),
        ("data:image/png;base64,aGk", "not base64"),
        ("data:image/png;base64,aG\nk=", "not base64"),
        ("data:image/png;base64, aGk=", "not base64"),
        ("data:image/png;base64,aGk=aGk=", "not base64"),
        ("data:image/png;base64,a-k_", "not base64"),
        ("data:image/png;base64,aGk%3D", "not base64"),
        ("data:image/png;base64,äGk=", "not base64"),
    ],
)
def test_what_is_no_picture_is_refused(url, message):
    with pytest.raises(PictureError, match=message):
        open_data_url(url, name="it")


def test_formats_that_can_start_programs_are_not_opened():
    with pytest.raises(PictureError, match="not a picture, or of a format"):
        open_data_url("data:image/png;base64," + encoded(noise(), "EPS"), name="it")


def test_sizes_are_bounded():
    url = "data:image/png;base64," + encoded(noise())
    size = len(base64.b64decode(url.split(",")[1]))
    assert open_data_url(url, name="it", max_bytes=size).size == (7, 5)
    with pytest.raises(PictureError, match=rf"at most {size - 1} are allowed"):
        open_data_url(url, name="it", max_bytes=size - 1)
    with pytest.raises(PictureError, match=r"about \d+ bytes; at most 10 are allowed"):
        open_data_url(url, name="it", max_bytes=10)
    assert open_data_url(url, name="it", max_pixels=35).size == (7, 5)
    with pytest.raises(PictureError, match="7x5 is 35 pixels; at most 34 are allowed"):
        open_data_url(url, name="it", max_pixels=34)


def test_a_header_that_promises_billions_of_pixels_is_refused():
    data = io.BytesIO()
    Image.new("1", (1, 1)).save(data, "PNG")
    raw = bytearray(data.getvalue())
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    with pytest.raises(PictureError, match="far more pixels than a picture may have"):
        open_data_url("data:image/png;base64," + base64.b64encode(raw).decode(), name="it")
