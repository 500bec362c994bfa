from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.rotary_write_kv import rotary_write_kv_reference
from dist_vlm.kernels.rotary_write_kv_triton import rotary_write_kv_triton

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NUM_BLOCKS = 9


def make_case(
    num_tokens,
    *,
    device,
    heads=3,
    kv_heads=1,
    head_dim=24,
    rotary_dim=None,
    block_size=8,
    dtype=torch.float32,
):
    generator = torch.Generator().manual_seed(num_tokens)
    q = torch.randn(num_tokens, heads, head_dim, generator=generator)
    k, v = torch.randn(2, num_tokens, kv_heads, head_dim, generator=generator)
    angles = 6 * torch.rand(num_tokens, head_dim if rotary_dim is None else rotary_dim, generator=generator)
    caches = torch.randn(2, NUM_BLOCKS, block_size, kv_heads, head_dim, generator=generator)
    slots = torch.randperm(NUM_BLOCKS * block_size, generator=generator)[:num_tokens]
    return [*(x.to(device, dtype) for x in (q, k, v, angles.cos(), angles.sin(), *caches)), slots.to(device)]


def twin(case):
    return [x.clone() for x in case]


def compare(case) -> None:
    """The caches, too, as a whole: nothing beside the slots is written."""
    expected = twin(case)
    rotated = rotary_write_kv_reference(*expected)
    before = twin(case[:5])
    actual = rotary_write_kv_triton(*case)
    tolerance = TOLERANCE[case[0].dtype]
    torch.testing.assert_close(actual, rotated, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(case[5], expected[5], atol=tolerance, rtol=tolerance)
    assert torch.equal(case[6], expected[6])
    assert all(torch.equal(x, was) for x, was in zip(case[:5], before, strict=True))
    assert actual.is_contiguous()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_tokens", "heads", "kv_heads", "head_dim", "rotary_dim", "block_size"),
    [
        (0, 3, 1, 24, 24, 8),
        (1, 1, 1, 2, 2, 8),
        (1, 32, 32, 128, 128, 16),
        (7, 5, 2, 256, 256, 8),
        (5, 6, 3, 40, 12, 8),
        (4, 12, 12, 80, 80, 8),
        (13, 3, 1, 24, 24, 32),
        (3, 4, 2, 7, 6, 8),
        (2, 2, 2, 8, 0, 8),
        (6, 20, 4, 64, 32, 16),
    ],
)
def test_equals_the_reference(num_tokens, heads, kv_heads, head_dim, rotary_dim, block_size, dtype, device) -> None:
    compare(
        make_case(
            num_tokens,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            block_size=block_size,
            dtype=dtype,
            device=device,
        )
    )


def test_strided_views_of_a_fused_projection(device) -> None:
    case = make_case(5, heads=4, kv_heads=2, head_dim=8, device=device)
    fused = torch.cat(case[:3], dim=1)
    case[:3] = fused.split([4, 2, 2], dim=1)
    compare(case)


def test_other_strides(device) -> None:
    case = make_case(6, heads=4, kv_heads=2, head_dim=8, device=device)
    case[0] = case[0].transpose(0, 1).contiguous().transpose(0, 1)
    case[1] = case[1].transpose(1, 2).contiguous().transpose(1, 2)
    case[2] = torch.stack((case[2], case[2]), dim=-1)[..., 0]
    case[3] = torch.cat((case[3], case[3]), dim=1)[:, 8:]
    case[4] = case[4].T.contiguous().T
    case[7] = torch.stack((case[7], case[7]), dim=1)[:, 1]
    compare(case)


@pytest.mark.parametrize("outside", [-1, -1000, NUM_BLOCKS * 8, 2**40])
def test_a_slot_outside_the_cache_is_not_written(outside, device) -> None:
    case = make_case(6, heads=4, kv_heads=2, head_dim=8, device=device)
    real = [0, 2, 5]
    expected = twin(case)
    rotary_write_kv_reference(*(x[real] if index not in (5, 6) else x for index, x in enumerate(expected)))
    every_query = rotary_write_kv_reference(*twin(case))
    case[7][[1, 3, 4]] = outside
    rotated = rotary_write_kv_triton(*case)
    torch.testing.assert_close(case[5], expected[5], atol=1e-6, rtol=1e-6)
    assert torch.equal(case[6], expected[6])
    torch.testing.assert_close(rotated, every_query, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (1, torch.zeros(4, 1, 25), ValueError, "k has shape"),
        (2, torch.zeros(4, 1, 24, dtype=torch.float16), TypeError, "value has dtype"),
        (3, torch.zeros(4, 26), ValueError, "sin has shape"),
        (5, torch.zeros(8, 9, 1, 24).transpose(0, 1), ValueError, "key_cache has strides"),
        (7, torch.zeros(5, dtype=torch.int64), ValueError, "slot_mapping has shape"),
        (7, torch.zeros(4, dtype=torch.int32), TypeError, "slot_mapping has dtype"),
    ],
)
def test_wrong_arguments_are_named(index, value, error, message, device) -> None:
    case = make_case(4, device=device)
    case[index] = value.to(device)
    with pytest.raises(error, match=message):
        rotary_write_kv_triton(*case)


def test_a_dtype_it_would_compute_too_coarsely_is_refused(device) -> None:
    with pytest.raises(TypeError, match=r"rotary_write_kv: q has dtype torch.float64, must be one of"):
        rotary_write_kv_triton(*make_case(2, dtype=torch.float64, device=device))


@pytest.mark.gpu
def test_runs_in_a_graph(device, replay) -> None:
    case = make_case(5, heads=32, kv_heads=32, head_dim=128, dtype=torch.bfloat16, device=device)
    expected = twin(case)
    rotated = rotary_write_kv_reference(*expected)
    actual = replay(lambda: rotary_write_kv_triton(*case))
    torch.testing.assert_close(actual, rotated, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(case[5], expected[5], atol=2e-2, rtol=2e-2)
