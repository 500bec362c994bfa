"""Triton kernels compiled and not launched: into Triton's cache on disk, for processes that launch them later."""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

_WARP = 32
_NVIDIA = "triton.backends.nvidia.driver"
# Of the CUDA driver's `CUdevice_attribute`.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and what it was launched with. Tensors need no memory: their type and place in 16 bytes count."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, *, launches: bool = True) -> None:
        """Compiles for the target that `compile_for` has set, unless the cache has it.

        launches: compiles what hands the arguments over too, by a C compiler; that links with the CUDA driver.
        """
        compiled = self.kernel.run(*self.arguments, grid=(1,), warmup=True, **self.options)
        if launches:
            driver.active.launcher_cls(compiled.src, compiled.metadata)

    @property
    def variant(self) -> Hashable:
        """Equal for launches of one compiled kernel."""
        names, fixed, varying = _parameters(self.kernel)
        told = {**dict(zip(names, self.arguments, strict=False)), **self.options}
        described = (
            (name, value if name in fixed or name not in names else _kind(value, name not in varying))
            for name, value in told.items()
        )
        return self.kernel, tuple(sorted(described, key=lambda pair: pair[0]))


@contextmanager
def launches_told() -> Iterator[list[Launch]]:
    """Within it no kernel is launched; the list gets the first launch of each variant. Not for several threads."""
    found: dict[Hashable, Launch] = {}
    launches: list[Launch] = []

    def getitem(kernel: Any, grid: Any) -> Any:
        del grid

        def tell(*arguments: Any, **options: Any) -> None:
            launch = Launch(kernel, arguments, options)
            if found.setdefault(launch.variant, launch) is launch:
                launches.append(launch)

        return tell

    before = KernelInterface.__getitem__
    KernelInterface.__getitem__ = getitem
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = before


def compile_for(capability: int) -> None:
    """From here on this process compiles for GPUs of this capability (90 for 9.0), and can launch nothing."""
    driver.set_active(_Target(GPUTarget("cuda", capability, _WARP)))


def compile_driver() -> None:
    """Compiles Triton's own part in C, which links with the CUDA driver; `compile_for` was called before."""
    _ = driver.active.utils


def gpu_capability() -> int:
    """Of the first GPU, 90 for 9.0. Makes no context on it. Raises `RuntimeError` where the driver has none."""
    found = [ctypes.c_int(), ctypes.c_int()]
    for value, attribute in zip(found, (_CAPABILITY_MAJOR, _CAPABILITY_MINOR), strict=True):
        _ask_driver("cuDeviceGetAttribute", ctypes.byref(value), attribute, _first_gpu())
    return 10 * found[0].value + found[1].value


def gpu_name() -> str:
    """Of the first GPU, as torch gives it. Makes no context on it. Raises `RuntimeError` where the driver has none."""
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _ask_driver("cuDeviceGetName", name, _NAME_BYTES, _first_gpu())
    return name.value.decode()


def _first_gpu() -> ctypes.c_int:
    device = ctypes.c_int()
    _ask_driver("cuInit", 0)
    _ask_driver("cuDeviceGet", ctypes.byref(device), 0)
    return device


def _ask_driver(call: str, *arguments: Any) -> None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"the CUDA driver cannot be loaded: {error}") from None
    if status := getattr(cuda, call)(*arguments):
        raise RuntimeError(f"{call} gave {status}")


class _Target:
    """What compiling asks of Triton's driver: that of the CUDA runtime would take the GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @functools.cached_property
    def utils(self) -> Any:
        return import_module(_NVIDIA).CudaUtils()

    @property
    def launcher_cls(self) -> Any:
        return import_module(_NVIDIA).CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


@functools.cache
def _parameters(kernel: Any) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Names of the parameters, of those that are compiled in, and of those of which only the type counts."""
    parameters = inspect.signature(kernel.fn).parameters
    fixed = {name for name, parameter in parameters.items() if "constexpr" in str(parameter.annotation)}
    return tuple(parameters), frozenset(fixed), frozenset(getattr(kernel, "do_not_specialize", ()))


def _kind(value: Any, is_specialised: bool) -> Hashable:
    """What Triton looks at in an argument."""
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape)
    if hasattr(value, "data_ptr"):
        return value.dtype, is_specialised and value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        width = -(2**31) <= value < 2**31, value < 2**63
        return (width, value == 1, value % 16 == 0) if is_specialised else width
    return None if value is None else type(value).__name__
