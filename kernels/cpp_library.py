"""The CPU kernels of this folder's .cpp files: compiled for the machine at their first use, then kept.

The library lies in the user's cache folder under a name that tells sources, compiler, options and processor, so a
change of any of them compiles anew. It is called through ctypes: it needs no headers of Python or torch, and its
OpenMP threads are torch's own, since the loader gives it the libgomp that torch has loaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dist_vlm.kernels.cache_folder import cache_folder
from dist_vlm.kernels.compiler import COMPILERS, find_compiler

_log = logging.getLogger(__name__)

OPTIONS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
LIBRARIES = ("-lrt",)  # shm_open, before glibc 2.34
TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_int64 = ctypes.c_int64
_pointer = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "add_norm": (*[_pointer] * 4, _int64, _int64, ctypes.c_float),
    "silu_mul": (_pointer, _pointer, *[_int64] * 3),
    "quick_gelu": (_pointer, _pointer, _int64),
    "rotary": (*[_pointer] * 4, *[_int64] * 6),
    "prefill": (*[_pointer] * 5, *[_int64] * 9, ctypes.c_float),
    "decode": (*[_pointer] * 8, *[_int64] * 8, ctypes.c_float),
}


class CompileError(RuntimeError):
    """The CPU kernels could not be compiled."""


def function(name: str, dtype: torch.dtype) -> Any:
    """The kernel `name` for tensors of `dtype`. Raises `CompileError`, or `TypeError` for a dtype it does not have."""
    if dtype not in TYPE_NAMES:
        raise TypeError(f"{name}: dtype is {dtype}, must be one of {', '.join(map(str, TYPE_NAMES))}")
    return _typed_functions()[name, dtype]


@functools.cache
def _typed_functions() -> dict[tuple[str, torch.dtype], Any]:
    found = {}
    for name, arguments in _SIGNATURES.items():
        for dtype, suffix in TYPE_NAMES.items():
            entry = getattr(library(), f"{name}_{suffix}")
            entry.argtypes, entry.restype = arguments, None
            found[name, dtype] = entry
    return found


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, compiled if need be. Raises `CompileError`."""
    compiler = find_compiler()
    if compiler is None:
        raise CompileError(f"kernels 'cpp' needs one of {', '.join(COMPILERS)}; with kernels 'torch' none is needed")
    loaded = ctypes.CDLL(str(_built(compiler)))
    loaded.write_rows.argtypes = (*[_pointer] * 5, *[_int64] * 8)
    loaded.write_rows.restype = _int64
    return loaded


def _built(compiler: str) -> Path:
    folder = _cache_folder()
    path = folder / f"kernels-{_key(compiler)}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ranks of one machine start together: one compiles, the others wait
        if not path.exists():
            _compile(compiler, path)
    return path


def _cache_folder() -> Path:
    """A folder of this user's alone: what lies in it is loaded as code."""
    folder = cache_folder("kernels")
    if folder is not None:
        return folder
    _log.warning("there is no cache that is this user's alone: the CPU kernels are compiled for this process alone")
    return Path(tempfile.mkdtemp(prefix="dist-vlm-kernels-"))


def _sources() -> list[Path]:
    return sorted(Path(__file__).resolve().parent.glob("*.cpp"))


def _key(compiler: str) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for path in [*_sources(), *sorted(Path(__file__).resolve().parent.glob("*.h"))]:
        digest.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    digest.update(version + " ".join(OPTIONS + LIBRARIES).encode() + platform.machine().encode())
    # What -march=native looks at.
    described = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    fixed = ("flags", "Features", "model", "vendor_id", "CPU part")
    digest.update("".join(line for line in described.splitlines() if line.startswith(fixed)).encode())
    return digest.hexdigest()


def _compile(compiler: str, path: Path) -> None:
    began = time.perf_counter()
    unfinished = path.with_suffix(f".{os.getpid()}")
    command = [compiler, *OPTIONS, *map(str, _sources()), *LIBRARIES, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=300)
    if done.returncode != 0:
        _log.error("%s\n%s", " ".join(command), done.stderr)
        raise CompileError(f"{compiler} could not compile the CPU kernels (see the log); kernels 'torch' needs none")
    os.replace(unfinished, path)
    _log.info("compiled the CPU kernels in %.1f s: %s", time.perf_counter() - began, path)
