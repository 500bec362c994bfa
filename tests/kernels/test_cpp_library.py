from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_vlm.kernels import cpp_library
from dist_vlm.kernels.cpp_library import CompileError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a library that is not loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpp_library.library.cache_clear()
    cpp_library._typed_functions.cache_clear()
    yield tmp_path / "dist-vlm" / "kernels"
    cpp_library.library.cache_clear()
    cpp_library._typed_functions.cache_clear()


def test_a_compiled_library_is_kept_for_its_user_alone_and_used_again(cache: Path, monkeypatch) -> None:
    cpp_library.library()
    (built,) = cache.glob("*.so")
    assert cache.stat().st_mode & 0o077 == 0
    cpp_library.library.cache_clear()
    monkeypatch.setattr(cpp_library, "_compile", lambda *_: pytest.fail("compiled again"))
    cpp_library.library()
    assert list(cache.glob("*.so")) == [built]


def test_other_options_make_another_library(monkeypatch) -> None:
    compiler = cpp_library.find_compiler()
    before = cpp_library._key(compiler)
    monkeypatch.setattr(cpp_library, "OPTIONS", (*cpp_library.OPTIONS, "-g"))
    assert cpp_library._key(compiler) != before


def test_processes_that_start_together_compile_once(cache: Path) -> None:
    code = "from dist_vlm.kernels import cpp_library; cpp_library.library(); print(cpp_library.__file__)"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=100) for process in started] == [0, 0]
    assert len(list(cache.glob("*.so"))) == 1
    assert {path.name for path in cache.iterdir()} == {"lock", next(cache.glob("*.so")).name}


def test_a_missing_or_failing_compiler_is_named(cache: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpp_library, "find_compiler", lambda: None)
    with pytest.raises(CompileError, match="needs one of g\\+\\+, c\\+\\+; with kernels 'torch' none is needed"):
        cpp_library.library()
    monkeypatch.setattr(cpp_library, "find_compiler", lambda: "/bin/false")
    with pytest.raises(CompileError, match="/bin/false could not compile"):
        cpp_library.library()


def test_a_folder_that_cannot_be_written_to_costs_the_cache_only(tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = cpp_library._cache_folder()
    assert folder.stat().st_mode & 0o077 == 0
    assert "compiled for this process alone" in caplog.text
    folder.rmdir()


def test_a_dtype_without_kernels_is_named() -> None:
    with pytest.raises(TypeError, match="dtype is torch.float64, must be one of torch.float32"):
        cpp_library.function("silu_mul", torch.float64)
