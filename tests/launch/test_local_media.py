from __future__ import annotations

import base64
import os
import re
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from dist_vlm.launch.local_media import LocalMedia


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with a red picture in it, and a blue one beside the directory."""
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    Image.new("RGB", (8, 6), (255, 0, 0)).save(root / "below" / "red.png")
    Image.new("RGB", (5, 5), (0, 0, 255)).save(tmp_path / "blue.png")
    return root


def load(root: Path, name: object, max_pixels: int = 1000) -> Image.Image:
    return LocalMedia(root, max_pixels=max_pixels).load(name)


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    content = BytesIO()
    picture.save(content, kind)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


@pytest.mark.parametrize("name", ["below/red.png", "./below/../below/red.png", "{root}/below/red.png"])
def test_a_file_inside_is_read(root: Path, name: str) -> None:
    picture = load(root, name.format(root=root))
    assert (picture.size, picture.mode, picture.getpixel((0, 0))) == ((8, 6), "RGB", (255, 0, 0))


def test_a_link_that_stays_inside_is_followed(root: Path) -> None:
    (root / "link.png").symlink_to("below/red.png")
    assert load(root, "link.png").size == (8, 6)


def test_the_root_may_be_a_link_itself(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert load(link, "below/red.png").size == (8, 6)


@pytest.mark.parametrize("name", ["../blue.png", "below/../../blue.png", "{outside}", "out.png", "out/blue.png"])
def test_nothing_outside_is_read(root: Path, name: str) -> None:
    (root / "out.png").symlink_to("../blue.png")
    (root / "out").symlink_to("..")
    assert (root / "out" / "blue.png").is_file()
    with pytest.raises(ValueError, match=r"leads out of .*/root, the only directory"):
        load(root, name.format(outside=root.parent / "blue.png"))


def test_a_neighbour_whose_name_begins_alike_is_outside(root: Path) -> None:
    other = root.with_name("root-2")
    other.mkdir()
    Image.new("RGB", (2, 2)).save(other / "a.png")
    with pytest.raises(ValueError, match="leads out"):
        load(root, "../root-2/a.png")


def test_what_is_outside_is_not_told_to_exist(root: Path) -> None:
    """The same answer whether the file is there or not."""
    for name in ("../blue.png", "../absent.png"):
        with pytest.raises(ValueError, match="leads out"):
            load(root, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.png", "there is no such file in"),
        ("below", "there is no such file in"),
        ("pipe", "there is no such file in"),
        ("circle", "circle"),
        ("a\0b.png", "is not the name of a file"),
        ("x" * 5000, "is not the name of a file"),
        ("", "must be the name of a file, an http(s) or a data: URL"),
        (7, "must be the name of a file, an http(s) or a data: URL"),
        (None, "must be the name of a file, an http(s) or a data: URL"),
        ("ftp://127.0.0.1/a.png", "must be the name of a file, an http(s) or a data: URL"),
        ("file:///etc/passwd", "must be the name of a file, an http(s) or a data: URL"),
        ("text.png", "not a picture"),
        ("data:text/plain;base64,AAAA", "must begin like data:image/png;base64,"),
        ("data:image/png,AAAA", "must begin like data:image/png;base64,"),
        ("data:image/png;base64,A!", "not base64"),
        ("data:image/png;base64,AAAA", "not a picture"),
    ],
)
def test_a_wrong_name_is_told(root: Path, name: object, message: str) -> None:
    (root / "text.png").write_text("not a picture")
    (root / "circle").symlink_to("circle")
    os.mkfifo(root / "pipe")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(root, name)
    assert len(str(caught.value)) < 400


def test_a_data_url_is_decoded_whatever_type_it_names(root: Path) -> None:
    picture = load(root, data_url(Image.new("RGBA", (4, 3), (0, 255, 0, 255)), "WEBP"))
    assert (picture.size, picture.mode) == ((4, 3), "RGB")


def test_too_many_pixels_are_refused_in_both(root: Path) -> None:
    for name in ("below/red.png", data_url(Image.new("RGB", (8, 6)))):
        with pytest.raises(ValueError, match="8x6 is 48 pixels; at most 47"):
            load(root, name, max_pixels=47)
