from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_vlm.kernels.cache_folder import cache_folder


def test_it_is_the_users_alone_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    before = os.umask(0o002)
    try:
        folder = cache_folder("things")
    finally:
        os.umask(before)
    assert folder == tmp_path / "here" / "dist-vlm" / "things" == cache_folder("things")
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("things") == tmp_path / "home" / ".cache" / "dist-vlm" / "things"


def test_there_is_none_where_it_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder("things") is None


def test_there_is_none_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder("things") is None


@pytest.mark.parametrize("which", ["dist-vlm", "dist-vlm/things"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, mode: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dist-vlm" / "things").mkdir(parents=True, mode=0o700)
    (tmp_path / "dist-vlm").chmod(0o700)
    assert cache_folder("things") is not None
    (tmp_path / which).chmod(mode)
    assert cache_folder("things") is None


def test_a_folder_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("things") is not None
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    assert cache_folder("things") is None
