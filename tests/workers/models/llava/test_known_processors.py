"""What is kept of an image processor serves a process that does not ask transformers, and no other settings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vlm.workers.coded_pixels import decoded
from dist_vlm.workers.models import get_family, read_spec
from dist_vlm.workers.models.llava import known_processors

IN_A_NEW_PROCESS = """
import sys
import numpy as np
from PIL import Image
from dist_vlm.workers.models import get_family, read_spec

spec = read_spec(sys.argv[1])
processor = get_family(spec.family).image_processor(spec)
pixels = processor.preprocess(Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)))
print(processor.digest, pixels.tobytes().hex(), sorted({"torch", "transformers"} & set(sys.modules)), sep="\\n")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dist-vlm" / "image-processors"


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8))


def made(path: Path):
    spec = read_spec(str(path))
    return get_family(spec.family).image_processor(spec)


def test_a_process_that_finds_it_known_imports_nothing_and_gives_the_same(cache: Path, tiny_facts: Path) -> None:
    first = made(tiny_facts)
    (entry,) = cache.iterdir()
    assert os.stat(cache).st_mode & 0o077 == 0
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tiny_facts)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert told == [first.digest, first.preprocess(picture()).tobytes().hex(), "[]"]
    # Not what transformers would say now, but what is kept: so it is that which was used.
    kept = json.loads(entry.read_text())
    kept["scaled_crop"]["levels"][0] = [level + 1.0 for level in kept["scaled_crop"]["levels"][0]]
    entry.write_text(json.dumps(kept))
    other = made(tiny_facts)
    difference = decoded(other.preprocess(picture())) - decoded(first.preprocess(picture()))
    assert sorted(set(np.round(difference.ravel(), 4).tolist())) == [0.0, 1.0]
    assert other._processor is None


def with_field(name: str, value: Any) -> Callable[[str], str]:
    def change(good: str) -> str:
        kept = json.loads(good)
        kept["scaled_crop"][name] = value
        return json.dumps(kept)

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: "",
        lambda good: good[:100],
        lambda good: "[]",
        lambda good: json.dumps(json.loads(good) | {"digest": 7}),
        with_field("levels", [[1.0]]),
        with_field("shortest_edge", "56"),
        with_field("height", 56.0),
        with_field("more", 1),
    ],
)
def test_an_entry_that_cannot_be_read_is_found_out_anew(
    cache: Path, tiny_facts: Path, spoil: Callable[[str], str]
) -> None:
    first = made(tiny_facts)
    (entry,) = cache.iterdir()
    good = entry.read_text()
    entry.write_text(spoil(good))
    assert made(tiny_facts).digest == first.digest
    assert entry.read_text() == good


def test_other_settings_and_other_versions_are_not_known(
    cache: Path, tiny_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tiny_facts)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(tiny_facts / name, tmp_path / name)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert known_processors.find("CLIPImageProcessorPil", settings) is not None
    assert known_processors.find("LlavaImageProcessorPil", settings) is None
    assert known_processors.find("CLIPImageProcessorPil", settings | {"image_mean": [0.4, 0.5, 0.5]}) is None
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    assert known_processors.find("CLIPImageProcessorPil", settings) is None
    monkeypatch.setattr("importlib.metadata.version", missing)
    assert known_processors.find("CLIPImageProcessorPil", settings) is None


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_without_a_cache_it_is_found_out_each_time(
    tiny_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert made(tiny_facts).digest == made(tiny_facts).digest
