from __future__ import annotations

from pathlib import Path

import pytest
from server_process import gpu_memory


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that lists two GPUs, or the one that --id names."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ntest "$1" = --query-gpu=index,memory.used || exit 1\n'
        'case "$3" in --id=[!1]*) exit 6;; --id=1) ;; *) echo "0, 3";; esac\necho "1, 140000"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("nvidia_smi")
def test_memory_of_each_gpu_is_what_the_driver_says() -> None:
    assert gpu_memory() == {"gpu 0": 3 << 20, "gpu 1": 140000 << 20}


@pytest.mark.usefixtures("nvidia_smi")
@pytest.mark.parametrize(("visible", "found"), [("1", {"gpu 1": 140000 << 20}), ("-1", {}), ("", {})])
def test_gpus_that_are_hidden_are_not_asked(monkeypatch: pytest.MonkeyPatch, visible: str, found: object) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_memory() == found


def test_without_a_driver_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() == {}
