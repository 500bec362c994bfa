"""Shared by all tests: random checkpoints, the skips of tests that need GPUs, and how triton runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

from dist_vlm.machine import nvidia_gpu_seen

# Before anything imports triton, as transformers' models do: without a GPU its kernels are interpreted.
if not nvidia_gpu_seen():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A machine that is shared makes an example slow by itself. `ci` is what hypothesis takes where it sees one.
for name in ("default", "ci"):
    hypothesis.settings.register_profile(name, hypothesis.settings.get_profile(name), deadline=None)
hypothesis.settings.load_profile(hypothesis.settings.get_current_profile_name())

ROOT = Path(__file__).resolve().parent.parent
MAKE_LLAVA = ROOT / "benchmarks" / "peers" / "make_llava.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-matrix", action="store_true", help="every parity point, not the pairwise part of them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests without a GPU that torch can use, and `multi_gpu` tests with fewer than two."""
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("multi_gpu")]
    if not marked:
        return
    import torch

    found = torch.cuda.device_count()
    for item in marked:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if found < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU(s), torch sees {found}"))


def make_checkpoint(out: Path, *arguments: str) -> Path:
    command = [sys.executable, str(MAKE_LLAVA), "--out", str(out), "--corpus-mb", "0.3", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=110)
    return out


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 checkpoint: hidden 128, 2 layers, 4 heads, 2 KV heads, 16 tokens an image. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", "--preset", "tiny")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bfloat16 checkpoint of 212 million parameters, 424 MB. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small", "--preset", "small")


@pytest.fixture(scope="session")
def tiny_facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint without weights, for tests that only read its JSON files. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-facts", "--preset", "tiny", "--config-only")


@pytest.fixture(scope="session")
def facts_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the 7b size without weights. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "7b-facts", "--preset", "7b", "--config-only")
