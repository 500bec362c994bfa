from __future__ import annotations

from pathlib import Path

import pytest
from server_process import gpu_memory


def test_memory_of_each_gpu_is_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ntest "$1" = --query-gpu=index,memory.used || exit 1\necho "0, 3"\necho "1, 140000"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() == {"gpu 0": 3 << 20, "gpu 1": 140000 << 20}


def test_without_a_driver_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() == {}
