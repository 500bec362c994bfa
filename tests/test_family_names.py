"""Only model folders name a model family: everything else works for any."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEARCHED = ("dist_vlm", "workers", "kernels", "launch", "scripts")
LINKS = tuple(ROOT / "dist_vlm" / name for name in ("workers", "kernels", "launch"))
FAMILY = re.compile(
    r"(?i:llava|llama|vicuna|qwen|mistral|mixtral|gemma|phi-?3|siglip|internvl|deepseek|pixtral|clip_vision|openai/clip)"
    r"|CLIP"  # in lower case it is what numpy and torch call bounding a value
)


def searched_files() -> Iterator[Path]:
    for top in SEARCHED:
        for file in sorted((ROOT / top).rglob("*")):
            inside_link = any(link in file.parents for link in LINKS)
            if (
                file.suffix in (".py", ".sh", ".cpp", ".cu")
                and not inside_link
                and ROOT / "workers/models" not in file.parents
            ):
                yield file


def family_names(text: str) -> list[str]:
    return FAMILY.findall(text)


def test_no_family_is_named_outside_its_folder() -> None:
    found = {
        str(file.relative_to(ROOT)): names for file in searched_files() if (names := family_names(file.read_text()))
    }
    assert not found


def test_the_search_reaches_every_floor_and_skips_the_models() -> None:
    tops = {file.relative_to(ROOT).parts[0] for file in searched_files()}
    assert tops == set(SEARCHED)
    assert family_names((ROOT / "workers/models/__init__.py").read_text())
    assert not [file for file in searched_files() if "models" in file.parts]


@pytest.mark.parametrize("text", ["LlavaProcessor", "from transformers import CLIPVisionModel", "x = 'llama'", "CLIP"])
def test_a_family_name_is_found(text: str) -> None:
    assert family_names(text)


@pytest.mark.parametrize("text", ["np.clip(x, 0, 1)", "values.clip(0)", "the clipped value"])
def test_bounding_a_value_is_no_family(text: str) -> None:
    assert not family_names(text)
