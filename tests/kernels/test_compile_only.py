from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dist_vlm.kernels import compile_only
from dist_vlm.kernels.compile_only import Launch, gpu_capability, launches_told
from dist_vlm.kernels.quick_gelu import quick_gelu_reference
from dist_vlm.kernels.quick_gelu_triton import quick_gelu_triton


def kernel(x, steps, scale, count, size: tl.constexpr):
    pass


def test_launches_are_told_once_a_variant_and_not_made() -> None:
    x = torch.full((4, 8), float("nan"), device="meta")
    with launches_told() as launches:
        assert quick_gelu_triton(x).shape == x.shape
        quick_gelu_triton(torch.empty((2, 8), device="meta"))
        assert len(launches) == 1
        quick_gelu_triton(x.half())
        quick_gelu_triton(torch.empty(7, device="meta"))
    assert [launch.arguments[0].dtype for launch in launches] == [torch.float32, torch.float16, torch.float32]
    assert launches[0].options["num_warps"] == 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    real = torch.linspace(-2, 2, 9, device=device)
    torch.testing.assert_close(quick_gelu_triton(real), quick_gelu_reference(real))


def test_variants_differ_where_triton_compiles_anew() -> None:
    """For every pair of launches, by what Triton itself distinguishes."""
    function = JITFunction(kernel, do_not_specialize=["steps"])
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(function.signature, function.params, backend)
    tensors = [torch.empty(8, dtype=torch.int64, device="meta")[first:] for first in (0, 1, 2)]
    tensors.append(torch.empty(8, device="meta"))
    cases = [
        *((x, 1, 0.5, 16, {"size": 4}) for x in (*tensors, None)),
        *((tensors[0], steps, 0.5, 16, {"size": 4}) for steps in (2, 16, 2**31, 2**40)),
        *((tensors[0], 1, scale, 16, {"size": 4}) for scale in (1.0, -7.25)),
        *((tensors[0], 1, 0.5, count, {"size": 4}) for count in (1, 3, 5, 32, 2**31, -(2**31), 2**31 + 1)),
        *((tensors[0], 1, 0.5, 16, {"size": size, "num_warps": warps}) for size in (4, 8) for warps in (2, 4)),
    ]
    found = []
    for x, steps, scale, count, options in cases:
        arguments = (x, steps, scale, count)
        _, specialization, told = binder(*arguments, **options)
        found.append((Launch(function, arguments, options).variant, (specialization, told)))
    for (ours, theirs), (other, expected) in combinations(found, 2):
        assert (ours == other) == (theirs == expected), (theirs, expected)


def test_a_capability_comes_from_the_cuda_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(value, which, device) -> int:
        value._obj.value = {75: 12, 76: 1}[which]
        return 0

    fake = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGet=lambda *_: 0, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(compile_only.ctypes, "CDLL", lambda name: fake)
    assert gpu_capability() == 121
    fake.cuInit = lambda flags: 100
    with pytest.raises(RuntimeError, match="cuInit gave 100"):
        gpu_capability()


def test_without_a_cuda_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(compile_only.ctypes, "CDLL", absent)
    with pytest.raises(RuntimeError, match="cannot be loaded: libcuda"):
        gpu_capability()


_COMPILE = """
import torch
from dist_vlm.kernels.compile_only import compile_for, launches_told
from dist_vlm.kernels.silu_mul_triton import silu_mul_triton
compile_for(90)
with launches_told() as launches:
    silu_mul_triton(torch.empty((3, 64), device="meta", dtype=torch.bfloat16))
(launch,) = launches
launch.compile(launches=False)
"""


def test_a_kernel_is_compiled_into_the_cache_without_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", _COMPILE], env=environment, check=True, timeout=100)
    (binary,) = tmp_path.rglob("*.cubin")
    assert binary.read_bytes()[:4] == b"\x7fELF"
    assert triton.__version__ in next(tmp_path.rglob("_silu_mul_kernel.json")).read_text()
