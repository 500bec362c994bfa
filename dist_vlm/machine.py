"""What this machine has, told without importing torch."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Mapping


def usable_cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0))


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs the driver lists (nvidia-smi), in its order; empty without a driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    try:
        done = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", done.stdout, flags=re.MULTILINE)


def nvidia_gpu_seen(environ: Mapping[str, str] = os.environ, device_files: str = "/dev/nvidia[0-9]*") -> bool:
    """Whether a process started here could use an NVIDIA GPU: a device file or a listed GPU, not hidden by
    CUDA_VISIBLE_DEVICES."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return False
    return bool(glob.glob(device_files)) or bool(nvidia_gpus())


def memory_bytes() -> dict[str, int]:
    """ "total" and "available" bytes of main memory, from /proc/meminfo; empty where there is none."""
    found = {}
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if match := re.match(r"(MemTotal|MemAvailable):\s+(\d+) kB", line):
                    found[match[1].removeprefix("Mem").lower()] = int(match[2]) * 1024
    except OSError:
        return {}
    return found
