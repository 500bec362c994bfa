from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.triton_support import triton_interpreted


@pytest.fixture(autouse=True)
def can_run() -> None:
    if not torch.cuda.is_available() and not triton_interpreted():
        pytest.skip("torch sees no GPU, and TRITON_INTERPRET is not set")
