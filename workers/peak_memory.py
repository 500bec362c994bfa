"""The highest memory a piece of work took, by the kernel's or the GPU allocator's own count."""

from __future__ import annotations

import re
from pathlib import Path

import torch


class PeakMemory:
    """Measures from construction to `growth_bytes`.

    On a CPU: the process's resident high-water mark, mapped files included, reset through
    /proc/self/clear_refs. On a GPU: torch's allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._before = _status_bytes("VmRSS")
            except OSError:  # some sandboxes have no such file: only growth past an older peak is then seen
                self._before = _status_bytes("VmHWM")

    def growth_bytes(self) -> int:
        """Peak since construction, less the memory held at construction."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _status_bytes("VmHWM") - self._before


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match.group(1)) * 1024
