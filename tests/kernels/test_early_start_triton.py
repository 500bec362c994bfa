"""Kernels that start before the one before them has ended."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget

from dist_vlm.kernels.choice import choose
from dist_vlm.kernels.early_start_triton import launch_early, launch_late, options_for
from dist_vlm.kernels.triton_support import triton_interpreted

KERNELS = Path(__file__).parents[2] / "kernels"
EARLY = {"early": True, "launch_pdl": True}
# What a kernel may call ahead of its wait, beside loads of weights.
HARMLESS = {"start_next", "program_id", "num_programs", "arange", "cdiv", "full", "zeros", "to", "cast"}


class Driver:
    """What is asked of Triton's driver."""

    def __init__(self, backend: str, arch: int | str) -> None:
        self._target = GPUTarget(backend, arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target


@pytest.mark.parametrize(
    ("backend", "arch", "options"),
    [("cuda", 80, {}), ("cuda", 89, {}), ("cuda", 90, EARLY), ("cuda", 100, EARLY), ("hip", "gfx942", {})],
)
def test_which_devices_can(backend, arch, options) -> None:
    assert options_for(Driver(backend, arch)) == options


@pytest.mark.skipif(not triton_interpreted(), reason="kernels are compiled here")
def test_an_interpreted_kernel_does_not() -> None:
    assert launch_early() == {}
    assert launch_late() == {}


def early_kernels() -> dict[str, ast.FunctionDef]:
    functions = (
        node
        for path in sorted(KERNELS.rglob("*_triton.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("kernel")
        and any(argument.arg == "early" for argument in node.args.args)
    )
    return {function.name: function for function in functions}


def calls_of(node: ast.AST, name: str) -> list[ast.Call]:
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name | ast.Attribute) and called(call) == name
    ]


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else call.func.attr


@pytest.mark.parametrize("name", early_kernels())
def test_every_program_of_a_kernel_awaits_the_kernel_before(name) -> None:
    """Did none of them, the kernel after it would run beside those before. What comes ahead reads weights alone."""
    body = early_kernels()[name].body
    [place] = [number for number, line in enumerate(body) if calls_of(line, "await_previous")]
    assert isinstance(body[place], ast.Expr), "in no branch and no loop"
    ahead = ast.Module(body[:place], [])
    assert not any(isinstance(node, ast.Return) for node in ast.walk(ahead))
    assert {called(node) for node in ast.walk(ahead) if isinstance(node, ast.Call)} <= HARMLESS | {"load"}
    read = [ast.unparse(call.args[0]) for call in calls_of(ahead, "load")]
    assert all(address.startswith("weight") for address in read), read


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_recorded_chain_gives_what_it_gives_one_kernel_at_a_time(rows) -> None:
    """Each kernel reads what the one before has written, over the same few buffers and one cache again and again."""
    ops, hidden, middle, head_dim = choose("triton", "cuda"), 1024, 2816, 128
    generator = torch.Generator("cuda").manual_seed(rows)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)

    layers = [
        tuple(
            normal(out, width) / width**0.5
            for out, width in ((3 * hidden, hidden), (hidden, hidden), (2 * middle, hidden), (hidden, middle))
        )
        for _ in range(20)
    ]
    norm, start = torch.ones(hidden, device="cuda", dtype=torch.bfloat16), normal(rows, hidden)
    keys, values = normal(2, 4 * rows, 16, hidden // head_dim, head_dim)
    tables = torch.arange(4 * rows, device="cuda", dtype=torch.int32).view(rows, 4)
    slots, contexts = torch.arange(rows, device="cuda"), torch.full((rows,), 50, device="cuda")
    plan = ops.recorded.plan_decode(slots, contexts, tables, block_size=16)
    mapping, angles = tables[:, 3].long() * 16 + 1, normal(rows, head_dim)
    torch.cuda.synchronize()

    def chain(wait):
        def after(result):
            wait()
            return result

        def reduced(partial, residual):
            return after(ops.reduce_add_norm(partial, residual, norm, eps=1e-5, all_reduce=lambda x: x))

        partial, residual = start.clone(), None
        for qkv, out, gate_up, down in layers:
            normed, residual = reduced(partial, residual)
            heads = after(ops.linear(normed, qkv, None)).view(rows, -1, head_dim)
            new = (*heads.chunk(3, dim=1), angles.cos(), angles.sin(), keys, values, mapping)
            attended = after(ops.attention(*new, plan, scale=head_dim**-0.5))
            normed, residual = reduced(after(ops.linear(attended.flatten(1), out, None)), residual)
            product = after(ops.silu_mul(after(ops.linear(normed, gate_up, None))))
            partial = after(ops.linear(product, down, None))
        return partial

    apart = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = chain(lambda: None)
    for _ in range(50):
        together.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(together, apart)
