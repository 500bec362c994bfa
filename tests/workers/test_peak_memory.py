import subprocess
import sys

import pytest
import torch

from dist_vlm.workers.peak_memory import PeakMemory

MEGABYTE = 1 << 20


_PROGRAM = """
import numpy as np, torch
from dist_vlm.workers.peak_memory import PeakMemory

MEGABYTE = 1 << 20
peak = PeakMemory(torch.device("cpu"))
block = np.ones(64 * MEGABYTE, np.uint8)
del block
assert 60 * MEGABYTE < peak.growth_bytes() < 80 * MEGABYTE, peak.growth_bytes()
assert PeakMemory(torch.device("cpu")).growth_bytes() < 8 * MEGABYTE
"""


def test_it_sees_memory_that_was_given_back():
    """In a process of its own: what others of this one give back meanwhile would count."""
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True, timeout=100)


@pytest.mark.gpu
def test_on_a_gpu_it_counts_torchs_allocations():
    peak = PeakMemory(torch.device("cuda"))
    block = torch.empty(64 * MEGABYTE, dtype=torch.uint8, device="cuda")
    del block
    assert peak.growth_bytes() == 64 * MEGABYTE
