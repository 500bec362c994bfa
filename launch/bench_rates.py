"""What a GPU does by itself: bytes copied and numbers multiplied in a second. Measured in a process of its own, whose
end leaves the GPU's memory empty for the engine.

As a program it prints one JSON object: python -m dist_vlm.launch.bench_rates --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
_TIMEOUT_S = 180.0
_COPY_BYTES = 2 << 30
_MATRIX_SIZE = 8192
# Each window is long against a launch and against the wait at its end. The fastest of them counts: a floor is a best.
_NUM_WINDOWS = 5
_CALLS_PER_WINDOW = 10


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """copy_bytes_per_s: read and written, of a large copy within the memory.
    matmul_flop_per_s: of a large square product in `dtype`, an addition and a multiplication counted as two.
    """

    copy_bytes_per_s: float
    matmul_flop_per_s: float
    dtype: str


def measured_rates(dtype: str) -> DeviceRates:
    """The rates of the first visible GPU. Raises `RuntimeError` if they cannot be measured."""
    command = [sys.executable, "-m", __name__, "--dtype", dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the device's rates were not measured within {_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(f"the device's rates could not be measured: {lines[-1]}")
    return DeviceRates(**json.loads(done.stdout.splitlines()[-1]))


def measure(device: torch.device, dtype: str, *, copy_bytes: int, matrix_size: int) -> DeviceRates:
    """The rates of a device, measured here."""
    copy_s, product_s = _copy_s(device, copy_bytes), _product_s(device, dtype, matrix_size)
    return DeviceRates(2 * copy_bytes / copy_s, 2 * matrix_size**3 / product_s, dtype)


def _copy_s(device: torch.device, num_bytes: int) -> float:
    import torch

    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device)


def _product_s(device: torch.device, dtype: str, size: int) -> float:
    import torch

    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    product = torch.empty_like(left)
    return _seconds(lambda: torch.mm(left, right, out=product), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, in the fastest window, after one window that warms up."""
    return min([_window(call, device) for _ in range(1 + _NUM_WINDOWS)][1:]) / _CALLS_PER_WINDOW


def _window(call: Callable[[], object], device: torch.device) -> float:
    import torch

    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    for _ in range(_CALLS_PER_WINDOW):
        call()
    wait()
    return time.perf_counter() - began


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    dtype = parser.parse_args().dtype
    rates = measure(torch.device("cuda"), dtype, copy_bytes=_COPY_BYTES, matrix_size=_MATRIX_SIZE)
    print(json.dumps(asdict(rates)))


if __name__ == "__main__":
    main()
