"""What `import dist_vlm` offers: the names, where they live, and what they cost."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest

import dist_vlm

HOMES = {
    "AsyncLLM": "dist_vlm.async_llm",
    "LLM": "dist_vlm.llm",
    "SamplingParams": "dist_vlm.sampling",
    "TextPrompt": "dist_vlm.inputs",
    "TokensPrompt": "dist_vlm.inputs",
    "PromptStrictInputs": "dist_vlm.inputs",
    "ImagePixelData": "dist_vlm.multimodal.image",
    "ImageFeatureData": "dist_vlm.multimodal.image",
    "RequestOutput": "dist_vlm.outputs",
    "CompletionOutput": "dist_vlm.outputs",
    "Logprob": "dist_vlm.outputs",
    "EngineConfig": "dist_vlm.config",
    "ConfigError": "dist_vlm.config",
}


def test_the_public_names_are_the_known_ones() -> None:
    assert set(dist_vlm.__all__) == {*HOMES, "__version__"}
    assert dir(dist_vlm) == sorted(dist_vlm.__all__)


@pytest.mark.parametrize(("name", "home"), HOMES.items())
def test_a_public_name_is_the_one_of_its_module(name: str, home: str) -> None:
    assert getattr(dist_vlm, name) is getattr(importlib.import_module(home), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dist_vlm' has no attribute 'LMM'"):
        _ = dist_vlm.LMM


def test_the_version_is_the_installed_one() -> None:
    assert dist_vlm.__version__ == version("dist-vlm")


def test_the_package_itself_costs_no_heavy_import() -> None:
    code = (
        "import sys, dist_vlm; print([m for m in ('torch', 'ray', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
