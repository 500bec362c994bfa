from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.choice import IMPLEMENTATIONS, choose


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_op_is_of_the_implementation_named(name) -> None:
    ops = choose(name, torch.device("cpu"))
    assert set(ops.names) == {
        "plan_attention",
        "paged_attention",
        "write_kv",
        "apply_rotary",
        "silu_mul",
        "quick_gelu",
        "full_attention",
        "reduce_add_norm",
    }
    assert all(function == f"{op}_{name}" for op, function in ops.names.items())
    assert ops.workspace_bytes > 0


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("tritn", "cpu", "kernels is 'tritn', must be one of reference, torch, cpp"),
        ("cpp", "cuda", "kernels is 'cpp' on device 'cuda', must be one of reference, torch there"),
        ("torch", "meta", "device is 'meta', must be one of cpu, cuda"),
    ],
)
def test_an_unknown_name_is_refused_with_the_allowed_ones(name, device, message) -> None:
    with pytest.raises(ValueError, match=message):
        choose(name, device)
