"""Where Triton kernels are tested: on the GPU, or interpreted on the CPU (see tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_vlm.kernels.triton_support import triton_interpreted


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not triton_interpreted():
        pytest.skip("torch sees no GPU, and TRITON_INTERPRET is not set")
    return torch.device("cpu")


@pytest.fixture
def replay() -> Callable[[Callable[[], Any]], Any]:
    """Compiles and captures a call in a CUDA graph, and returns what a replay leaves in the call's results."""

    def run(call: Callable[[], Any]) -> Any:
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        graph.replay()
        torch.cuda.synchronize()
        return results

    return run
