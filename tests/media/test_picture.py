import io
import warnings

import numpy as np
import pytest
from PIL import Image

from dist_vlm.media import PictureError, load_image, to_rgb
from dist_vlm.media.picture import FORMATS, PictureMemoryError, open_picture


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(picture):
    return encoded(picture, "PNG")


# What EXIF's eight ways of holding a camera make of the rows and columns that people see.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_orientation_is_turned_upright(kind, orientation):
    stored = np.kron(np.random.default_rng(orientation).integers(0, 256, (2, 3, 1)), np.ones((16, 16, 3), int))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(stored.astype(np.uint8)), kind, exif=exif, **options)
    seen = np.asarray(to_rgb(Image.open(io.BytesIO(data)))).astype(int)
    expected = UPRIGHT[orientation](stored)
    assert seen.shape == expected.shape
    assert np.abs(seen - expected).max() <= (2 if kind == "JPEG" else 0)


def test_a_picture_of_another_mode_is_turned_too():
    grey = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = to_rgb(Image.open(io.BytesIO(encoded(Image.fromarray(grey), "PNG", exif=exif))))
    assert np.asarray(seen)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"\0", b"Exif\0\0"])
def test_damaged_exif_keeps_nobody_from_seeing_a_picture(exif):
    data = encoded(Image.new("RGB", (3, 2), "red"), "PNG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's own
        assert np.asarray(to_rgb(Image.open(io.BytesIO(data)))).tolist() == [[[255, 0, 0]] * 3] * 2


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert to_rgb(Image.open(io.BytesIO(encoded(Image.new("RGB", (3, 2)), "PNG", exif=exif)))).size == (3, 2)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused_in_our_words(kind, part):
    whole = encoded(Image.effect_noise((96, 96), 90).convert("RGB"), kind)
    to_rgb(open_picture(io.BytesIO(whole), name="it"))
    with pytest.raises(PictureError) as caught:
        to_rgb(open_picture(io.BytesIO(whole[: int(part * len(whole))]), name="it"), name="it")
    text = str(caught.value)
    assert text.startswith(("it: the picture is damaged or truncated (", "it: not a picture, or of a format"))


@pytest.mark.parametrize("kind", ["JPEG2000", "EPS", "ICO", "PPM", "TGA", "PCX", "ICNS", "PDF", "SGI", "DDS"])
def test_other_formats_are_not_opened(kind):
    data = encoded(Image.new("RGB", (16, 16)), kind)
    with pytest.raises(PictureError, match="^it: not a picture, or of a format that is not served$"):
        open_picture(io.BytesIO(data), name="it")


@pytest.mark.parametrize(
    "data", [b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", b"<!doctype html><p>x", b"", b"RIFF"]
)
def test_what_is_no_picture_is_not_opened(data):
    with pytest.raises(PictureError, match="^it: not a picture, or of a format that is not served$"):
        open_picture(io.BytesIO(data), name="it")


def test_pils_own_limit_is_left_alone():
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3


def test_memory_that_is_short_is_no_damage(monkeypatch):
    def short(self):
        raise MemoryError

    picture = Image.open(io.BytesIO(png(Image.new("RGB", (3, 2)))))
    monkeypatch.setattr(type(picture), "load", short)
    with pytest.raises(PictureMemoryError, match="^it: decoding it needs more memory than there is$"):
        to_rgb(picture, name="it")


def test_a_file_becomes_an_upright_rgb_picture(tmp_path):
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: the top-left pixel belongs at the top right
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert (upright.mode, upright.size) == ("RGB", (2, 4))
    assert upright.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_bad_files_are_named(tmp_path):
    whole = png(Image.effect_noise((64, 64), 50))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.png").write_bytes(b"<html>not a picture</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in [
        ("cut.png", "damaged or truncated"),
        ("page.png", "not a picture"),
        ("empty.png", "not a picture"),
        ("none.png", "no such file"),
        (".", r"cannot be read \(IsADirectoryError\)"),
    ]:
        with pytest.raises(PictureError, match=f"{name}.*{message}"):
            load_image(tmp_path / name)


def test_pixels_are_counted_before_any_is_decoded(tmp_path):
    with pytest.raises(PictureError, match="0x5 has no pixels"):
        to_rgb(Image.new("RGB", (0, 5)))
    with pytest.raises(PictureError, match="16x16 is 256 pixels; at most 255"):
        to_rgb(Image.new("RGB", (16, 16)), max_pixels=255)
    # A header that claims 200 million pixels over no data: refused by the header, not by decoding.
    header = bytearray(png(Image.new("L", (1, 1))))
    header[16:24] = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bytes(header))
    with pytest.raises(PictureError, match="pixels"):
        load_image(tmp_path / "bomb.png")


def test_a_decoders_own_words_never_reach_the_caller(tmp_path):
    whole = png(Image.effect_noise((64, 64), 50))
    (tmp_path / "cut.png").write_bytes(whole[:200])
    with pytest.raises(PictureError) as caught:
        load_image(tmp_path / "cut.png")
    assert "bytes" not in str(caught.value)
    assert caught.value.__cause__ is None
