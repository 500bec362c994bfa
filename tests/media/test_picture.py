import io

import pytest
from PIL import Image

from dist_vlm.media import PictureError, load_image, to_rgb


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


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
