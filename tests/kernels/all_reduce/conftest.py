from __future__ import annotations

import os

import pytest
import torch

from dist_vlm.kernels.triton_support import triton_interpreted

# Before CUDA is used: to load a kernel when it is first launched the device must be idle, which it is not while a
# virtual rank waits for another.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


@pytest.fixture(autouse=True)
def can_run() -> None:
    if not torch.cuda.is_available() and not triton_interpreted():
        pytest.skip("torch sees no GPU, and TRITON_INTERPRET is not set")
