from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.config_server import ServerConfig
from dist_vlm.engine.front import load_front
from dist_vlm.engine.images import PreparedImage
from dist_vlm.launch.line_pictures import LinePictures, image_preparer
from dist_vlm.launch.local_media import LocalMedia
from dist_vlm.launch.remote_media import RemoteMedia
from dist_vlm.sampling import SamplingParams

from ..server.picture_hosts import OTHER, picture_host
from .test_local_media import data_url

SERVER = ServerConfig(allowed_media_networks=("127.0.0.0/8",), image_fetch_timeout_s=5.0, max_image_mib=1)


@pytest.fixture(scope="module")
def config(tiny_facts: Path) -> EngineConfig:
    return resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu", max_image_pixels=40_000))


@pytest.fixture
def picture(tmp_path: Path) -> Image.Image:
    picture = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    picture.save(tmp_path / "a.png")
    return picture


def prepare(config: EngineConfig, root: Path, *lines: Sequence[Any]) -> list[Any]:
    async def run() -> list[Any]:
        local = LocalMedia(root, max_pixels=config.vision.max_image_pixels)
        pictures = LinePictures(image_preparer(config), config=config, local=local, remote=RemoteMedia(SERVER))
        try:
            return await asyncio.gather(*map(pictures.prepare, lines), return_exceptions=True)
        finally:
            await pictures.close()

    return asyncio.run(run())


def test_they_are_what_the_engine_makes_of_them(config: EngineConfig, tmp_path: Path, picture: Image.Image) -> None:
    """By file, in a data: URL and by http; against what `LLM.generate` does with the decoded picture."""
    request = {"prompt": "<image>", "multi_modal_data": {"image": picture}}
    (expected,) = load_front(config).processor.process("0", request, SamplingParams()).requests[0].images
    with picture_host() as host:
        names = ["a.png", data_url(picture), f"http://{OTHER}:{host.port}/picture.png"]
        (images,) = prepare(config, tmp_path, names)
    assert [type(image) for image in images] == [PreparedImage] * 3
    for image in images:
        assert (image.key, image.kind) == (expected.span.image, expected.kind)
        np.testing.assert_array_equal(image.array, expected.array)


def test_a_wrong_one_fails_its_line_alone(config: EngineConfig, tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (3, 2000)).save(tmp_path / "thin.png")
    with picture_host() as host:
        url = f"http://{OTHER}:{host.port}"
        wrong = {
            "absent.png": "there is no such file",
            "text.png": "not a picture",
            "thin.png": "times longer than wide",
            f"{url}/drawing.png": "not a picture",
            f"{url}/cut.png": "truncated",
            f"{url}/silent.png": "(refused)",
            f"{url}/endless.png": "(too large)",
            f"{url}/broken.png": "(status)",
        }
        good, *told = prepare(config, tmp_path, ["a.png"], *(["a.png", name] for name in wrong))
    assert isinstance(good[0], PreparedImage)
    for (name, problem), error in zip(wrong.items(), told, strict=True):
        assert isinstance(error, ValueError), name
        assert name in str(error)
        assert problem in str(error)


def test_no_thread_is_left(config: EngineConfig, tmp_path: Path, picture: Image.Image) -> None:
    before = set(threading.enumerate())
    prepare(config, tmp_path, ["a.png"] * 5)
    assert not {one for one in set(threading.enumerate()) - before if one.name.startswith("pictures")}
