from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dist_vlm.kernels import choice
from dist_vlm.kernels.choice import IMPLEMENTATIONS, choose

OPS = {
    "attention",
    "draw",
    "penalise",
    "embed",
    "linear",
    "plan_attention",
    "paged_attention",
    "rotary_write_kv",
    "silu_mul",
    "quick_gelu",
    "full_attention",
    "reduce_add_norm",
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_op_is_of_the_implementation_named(name) -> None:
    ops = choose(name, torch.device("cpu"))
    assert set(ops.names) == OPS
    shared = {"linear": "linear", "draw": "draw", "penalise": "penalise", "attention": "attention"} | (
        {"embed": "embed_torch"} if name == "cpp" else {}
    )
    assert ops.names == {op: f"{op}_{name}" for op in OPS} | shared
    assert ops.workspace_bytes > 0
    assert ops.recorded is None


def test_every_op_of_triton_is_in_triton_but_what_torch_does_as_well(device) -> None:
    ops = choose("triton", device)
    linear = "linear_triton" if device.type == "cuda" else "linear"
    expected = {op: f"{op}_triton" for op in OPS} | {"full_attention": "full_attention_torch", "linear": linear}
    assert ops.names == expected
    assert ops.workspace_bytes > 0
    recorded = ops.recorded
    assert [recorded.plan_decode.__name__, recorded.decode_inputs.__name__, recorded.greedy.__name__] == [
        "plan_decode_triton",
        "decode_inputs_triton",
        "greedy_triton",
    ]
    assert choose("triton", device) is ops


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("tritn", "cpu", "kernels is 'tritn', must be one of reference, torch, cpp, triton$"),
        ("cpp", "cuda", "kernels is 'cpp' on device 'cuda', must be one of reference, torch, triton there$"),
        ("triton", "cpu", "kernels is 'triton' on device 'cpu', must be one of reference, torch, cpp there$"),
        ("torch", "meta", "device is 'meta', must be one of cpu, cuda$"),
    ],
)
def test_an_unknown_name_is_refused_with_the_allowed_ones(name, device, message, monkeypatch) -> None:
    monkeypatch.setattr(choice, "triton_found", lambda: True)
    monkeypatch.setattr(choice, "triton_interpreted", lambda: False)
    with pytest.raises(ValueError, match=message):
        choose(name, device)


@pytest.mark.parametrize(("device", "allowed"), [("cuda", "reference, torch$"), ("cpu", "reference, torch, cpp$")])
def test_triton_is_refused_where_it_is_not_installed(device, allowed, monkeypatch) -> None:
    monkeypatch.setattr(choice, "triton_found", lambda: False)
    with pytest.raises(
        ValueError, match=f"kernels is 'triton' and triton cannot be imported, must be one of {allowed}"
    ):
        choose("triton", device)


def test_other_implementations_run_where_triton_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from dist_vlm.kernels.choice import choose;"
        "print(choose('torch', 'cuda').names['silu_mul'], choose('reference', 'cpu').names['silu_mul'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["silu_mul_torch", "silu_mul_reference"]
