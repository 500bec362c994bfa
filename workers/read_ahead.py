"""python -m dist_vlm.workers.read_ahead PARENT: has the system read what a rank's imports need, ahead of the rank, and
what the driver imports beside it.

An import reads one small file after the other and waits for each. A disk that nobody has read yet, or one behind a
network, serves many at a time. So many threads read here, into the system's cache and nowhere else; nothing depends on
it. Meanwhile the GPU's driver is kept open, which some machines take seconds to set up whenever nobody holds it.

It imports no more than it must, and ends with the process that has started it. PARENT: the id of that one.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import cache_from_source, find_spec
from pathlib import Path

_THREADS = 32
_LIBRARY_THREADS = 4
_LONGEST_S = 120.0
_LOOK_S = 0.2
_PART_BYTES = 1 << 20
# Not imported by a rank.
_LEFT_OUT = frozenset({"__pycache__", "test", "tests", "testing", "benchmarks", "include"})


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a package, or of a folder in one, and those below them.

    as_sources: whether their sources are read; otherwise what they are compiled to, where there is that.
    but: folders directly in it that are left out.
    """

    package: str
    as_sources: bool = False
    but: frozenset[str] = frozenset()


# In the order in which they are wanted: what a rank imports, then the rest of what the driver does for tokenizer and
# image processor, and of what compiles ahead. transformers reads all of its models' sources to learn what they offer.
MODULES = (
    Modules("ray", but=frozenset({"air", "llm", "rllib", "train", "tune"})),
    Modules("numpy"),
    Modules("torch", but=frozenset({"onnx"})),
    Modules("triton"),
    Modules("transformers", but=frozenset({"models"})),
    Modules("transformers/models", as_sources=True),
    Modules("sympy"),
    Modules("mpmath"),
)
# Read whole: a rank that takes a GPU looks through them page by page.
LIBRARIES = ("libtorch_python", "libtorch_cpu", "libtorch_cuda", "libtriton", "libcublas", "libcublasLt")
_LIBRARY_FOLDERS = ("torch/lib", "triton/_C", "nvidia")


def folder_of(package: str) -> Path | None:
    """Of a package, or of a folder below one ("package/folder"), which is not imported; None where there is none."""
    name, _, below = package.partition("/")
    spec = find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    folder = Path(places[0]) / below if places else None
    return folder if folder is not None and folder.is_dir() else None


def module_files(folder: Path, modules: Modules) -> tuple[list[str], list[Path]]:
    """The files that imports read of the modules directly in this folder, and the folders below it to go on with."""
    files, folders = [], []
    for entry in os.scandir(folder):
        if entry.is_dir():
            if entry.name not in _LEFT_OUT | modules.but:
                folders.append(Path(entry.path))
        elif entry.name.endswith(".py"):
            compiled = cache_from_source(entry.path)
            files.append(entry.path if modules.as_sources or not os.path.exists(compiled) else compiled)
    return files, folders


def library_files(names: Iterable[str] = LIBRARIES) -> Iterator[str]:
    """Of torch, of Triton and of what NVIDIA's packages bring, those of these names, in their order."""
    roots = [root for root in map(folder_of, _LIBRARY_FOLDERS) if root is not None]
    found = [file for root in roots for file in sorted(root.rglob("*.so*")) if file.is_file()]
    for name in names:
        yield from (str(file) for file in found if file.name.split(".so")[0] == name)


def read_file(path: str) -> int:
    """Reads a file and forgets it. Returns its bytes; 0 where it cannot be read."""
    total = 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        while part := os.read(descriptor, _PART_BYTES):
            total += len(part)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return total


def read_modules(chosen: Iterable[Modules], *, threads: int = _THREADS) -> int:
    """Reads them, and returns how many files that were."""
    pending: list[Future[None]] = []
    read: list[int] = []

    def read_folder(folder: Path, modules: Modules) -> None:
        files, folders = module_files(folder, modules)
        # Those that are named count for the package's own folder alone.
        below = Modules(modules.package, modules.as_sources)
        pending.extend(pool.submit(read_folder, one, below) for one in folders)
        for file in files:
            read.append(read_file(file))

    with ThreadPoolExecutor(threads) as pool:
        for modules in chosen:
            folder = folder_of(modules.package)
            if folder is not None:
                pending.append(pool.submit(read_folder, folder, modules))
        while pending:
            pending.pop().result()
    return len(read)


def read_libraries(names: Iterable[str] = LIBRARIES) -> int:
    """Reads them, and returns how many bytes that were."""
    with ThreadPoolExecutor(_LIBRARY_THREADS) as pool:
        return sum(pool.map(read_file, library_files(names)))


def hold_gpu() -> int:
    """Opens the GPU's driver for as long as this process lives; takes no memory of a GPU. Returns the driver's status,
    -1 where there is no driver. Python goes on meanwhile."""
    try:
        status: int = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        return -1
    return status


def main(words: Sequence[str]) -> int:
    parent, end = int(words[0]), time.monotonic() + _LONGEST_S
    tasks: list[Callable[[], object]] = [hold_gpu, partial(read_modules, MODULES), read_libraries]
    for task in tasks:
        threading.Thread(target=task, daemon=True).start()
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(_LOOK_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
