from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_vlm.machine import memory_bytes, nvidia_gpu_seen, nvidia_gpus, usable_cores


def fake_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts an `nvidia-smi` on the path, and nothing else."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_gpus_are_the_ones_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
    fake_smi(tmp_path, f"printf '{listing}'", monkeypatch)
    assert nvidia_gpus() == ["NVIDIA H200", "NVIDIA H200"]
    assert nvidia_gpu_seen({}, device_files=str(tmp_path / "none*"))


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "kill -9 $$"])
def test_a_driver_without_gpus_lists_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake_smi(tmp_path, script, monkeypatch)
    assert nvidia_gpus() == []
    assert not nvidia_gpu_seen({}, device_files=str(tmp_path / "none*"))


def test_no_driver_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_gpus() == []


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, True), ("0", True), ("1,0", True), ("GPU-1", True), ("", False), ("-1", False), ("-1,0", False)],
)
def test_a_device_file_counts_unless_hidden(tmp_path: Path, visible: str | None, seen: bool) -> None:
    (tmp_path / "nvidia3").touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert nvidia_gpu_seen(environ, device_files=str(tmp_path / "nvidia[0-9]*")) is seen


def test_cores_are_those_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cores() == len(allowed)


def test_memory_is_what_the_kernel_says() -> None:
    found = memory_bytes()
    assert found["total"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < found["available"] <= found["total"]
