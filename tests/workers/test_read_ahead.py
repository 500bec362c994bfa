"""What is read ahead against what the imports of a rank and of the driver open, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from dist_vlm.workers import read_ahead
from dist_vlm.workers.read_ahead import (
    MODULES,
    Modules,
    folder_of,
    hold_gpu,
    library_files,
    module_files,
    read_file,
    read_modules,
)

TOLD = """
import json, sys
opened = []
sys.addaudithook(lambda event, told: opened.append(told[0]) if event == "open" and isinstance(told[0], str) else None)
{}
print(json.dumps(opened))
"""
# Who -> its imports, the packages of which nearly all is to be read ahead, and of how many modules that is at least.
IMPORTS = {
    "rank": (
        "import ray, triton, dist_vlm.workers.runner; "
        "from dist_vlm.workers.models import get_family; get_family('llava').preload()",
        ("ray", "torch", "triton", "numpy"),
        1000,
    ),
    "driver": (
        "import torch, transformers.models; from transformers.modeling_utils import PreTrainedModel",
        ("torch", "transformers", "sympy", "mpmath", "numpy"),
        1500,
    ),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a compiled module, one that is not, and folders."""
    folder = tmp_path / "read_ahead_package"
    for file in ("__init__.py", "below/one.py", "below/deep/two.py", "tests/three.py", "left/four.py", "data.txt"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("x = 1")
    compiled = Path(cache_from_source(str(folder / "below/one.py")))
    compiled.parent.mkdir()
    compiled.write_bytes(b"compiled")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def read_of(package: Path, modules: Modules, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(read_ahead, "read_file", lambda path: found.append(path) or 1)
    assert read_modules([modules], threads=3) == len(found)
    return sorted(str(Path(path).relative_to(package)) for path in found)


def test_what_is_compiled_is_read_in_place_of_its_source(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = f"below/__pycache__/{Path(cache_from_source('one.py')).name}"
    whole = Modules("read_ahead_package")
    assert read_of(package, whole, monkeypatch) == sorted(["__init__.py", one, "below/deep/two.py", "left/four.py"])
    some = Modules("read_ahead_package", but=frozenset({"left", "deep"}))
    # `but` counts for the first folder alone.
    assert read_of(package, some, monkeypatch) == sorted(["__init__.py", one, "below/deep/two.py"])
    sources = Modules("read_ahead_package/below", as_sources=True)
    assert read_of(package, sources, monkeypatch) == ["below/deep/two.py", "below/one.py"]
    assert "read_ahead_package" not in sys.modules


def test_what_is_not_there_is_passed_over(tmp_path: Path) -> None:
    assert read_modules([Modules("read_ahead_nowhere"), Modules("numpy/nowhere")]) == 0
    assert read_file(str(tmp_path / "nowhere")) == 0 == read_file(str(tmp_path))


def test_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "long"
    file.write_bytes(bytes(3_000_001))
    assert read_file(str(file)) == 3_000_001


def source_of(path: str) -> str:
    """The module's .py, whether that or its bytecode was read: both are where the bytecode is of another time."""
    folder, name = os.path.split(path)
    if not name.endswith(".pyc"):
        return path
    return os.path.join(os.path.dirname(folder), name.partition(".")[0] + ".py")


@pytest.mark.parametrize(("imports", "packages", "least"), IMPORTS.values(), ids=IMPORTS)
def test_nearly_all_that_imports_read_is_read_ahead(imports: str, packages: tuple[str, ...], least: int) -> None:
    command = [sys.executable, "-c", TOLD.format(imports)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    roots = {name: str(folder_of(name)) + os.sep for name in packages}
    opened = {os.path.realpath(path) for path in json.loads(told.splitlines()[-1]) if path.endswith((".py", ".pyc"))}
    wanted = {source_of(path) for path in opened if path.startswith(tuple(map(os.path.realpath, roots.values())))}
    assert len(wanted) > least
    ahead: set[str] = set()
    for modules in MODULES:
        pending = [(folder_of(modules.package), modules)]
        while pending:
            folder, one = pending.pop()
            assert folder is not None
            files, folders = module_files(folder, one)
            ahead.update(source_of(os.path.realpath(path)) for path in files)
            pending += [(below, Modules(one.package, one.as_sources)) for below in folders]
    assert len(wanted - ahead) < 0.05 * len(wanted)


def test_libraries_are_found_without_an_import() -> None:
    (path,) = library_files(["libtorch_cpu", "libnowhere"])
    assert Path(path).name.startswith("libtorch_cpu.so")


def test_a_machine_without_a_driver_has_nothing_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(read_ahead.ctypes, "CDLL", absent)
    assert hold_gpu() == -1


def test_it_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os, subprocess, sys; "
        "words = [sys.executable, '-m', 'dist_vlm.workers.read_ahead', str(os.getpid())]; "
        "print(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}/status").exists():
        assert time.monotonic() < end, "it goes on without its parent"
        time.sleep(0.05)
