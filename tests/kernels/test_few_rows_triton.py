"""Products of 2 to 64 rows, against those in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from triton.runtime import driver

from dist_vlm.kernels import few_rows_triton, linear_triton
from dist_vlm.kernels.few_rows_triton import ROW_SIZES, Tiles, _can, few_rows, takes, tiles_for
from dist_vlm.kernels.triton_support import triton_interpreted

from .test_early_start_triton import Driver

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Interpreted, bfloat16 is not rounded as a GPU does.
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def can_run() -> None:
    if not triton_interpreted() and not _can(driver.active):
        pytest.skip("the GPU has no tensor memory accelerator")


def numbers(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles_of", [4096, 8192, 12288, 22016])
@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features"),
    [(2, 7, 40), (16, 64, 304), (8, 130, 512), (9, 65, 1000), (3, 32, 8), (33, 70, 776), (64, 64, 512), (32, 200, 640)],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_that_of_float64(device, num_rows, out_features, in_features, tiles_of, dtype, has_bias) -> None:
    """tiles_of: a number of outputs whose tiles are taken, for there are few here."""
    x = numbers(num_rows, in_features, dtype=dtype)
    weight = numbers(out_features, in_features, dtype=dtype, scale=in_features**-0.5)
    bias = numbers(out_features, dtype=dtype) if has_bias else None
    assert takes(x, weight)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tiles = tiles_for(num_rows, tiles_of)
    actual = few_rows(x.to(device), weight.to(device), None if bias is None else bias.to(device), tiles)
    assert actual.dtype == dtype and actual.shape == (num_rows, out_features)
    torch.testing.assert_close(actual.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_leading_axes_and_rows_of_a_wider_weight(device) -> None:
    x, wide = numbers(2, 3, 64, dtype=torch.float16), numbers(48, 96, dtype=torch.float16, scale=0.1)
    weight = wide.to(device)[:, 16:80]
    actual = few_rows(x.to(device), weight, None, tiles_for(6, 48))
    assert actual.shape == (2, 3, 48)
    torch.testing.assert_close(
        actual.cpu().double(), F.linear(x.double(), wide[:, 16:80].double()), atol=2e-3, rtol=2e-3
    )


@pytest.mark.parametrize("num_rows", [2, 8, 16])
def test_a_row_does_not_depend_on_the_others(device, num_rows) -> None:
    x, weight = numbers(16, 512, dtype=torch.float16).to(device), numbers(64, 512, dtype=torch.float16).to(device)
    alone = few_rows(torch.stack([x[0], torch.full_like(x[0], float("nan"))]), weight, None, tiles_for(16, 64))
    assert torch.equal(few_rows(x[:num_rows], weight, None, tiles_for(16, 64))[0], alone[0])


@pytest.mark.parametrize(
    ("backend", "arch", "can"),
    [("cuda", 80, False), ("cuda", 89, False), ("cuda", 90, True), ("cuda", 103, True), ("cuda", 120, False),
     ("hip", "gfx942", False)],
)  # fmt: skip
def test_which_devices_can(backend, arch, can) -> None:
    assert _can(Driver(backend, arch)) is can


def test_what_the_accelerator_cannot_fetch_is_refused() -> None:
    x, weight = torch.zeros(4, 64, dtype=torch.float16), torch.zeros(8, 64, dtype=torch.float16)
    assert takes(x, weight)
    assert not takes(x.float(), weight.float()), "float32"
    assert not takes(x[:, :60].contiguous(), weight[:, :60].contiguous()), "rows of 120 bytes"
    assert not takes(x[:, :32].contiguous(), weight[:, 4:36]), "a weight that begins at byte 8"
    assert not takes(x[:, :32].contiguous(), torch.zeros(8, 68, dtype=torch.float16)[:, :32]), (
        "136 bytes to the next row"
    )


@pytest.mark.parametrize(
    ("num_rows", "in_features", "dtype", "taken"),
    [(2, 64, torch.float16, 1), (64, 64, torch.float16, 1), (65, 64, torch.float16, 0), (1, 64, torch.float16, 0),
     (4, 60, torch.float16, 0), (4, 64, torch.float32, 0)],
)  # fmt: skip
def test_linear_takes_it_for_few_rows(device, monkeypatch, num_rows, in_features, dtype, taken) -> None:
    calls = []

    def told(*arguments):
        calls.append(arguments)
        return few_rows_triton.few_rows(*arguments)

    monkeypatch.setattr(linear_triton, "few_rows", told)
    x, weight = numbers(num_rows, in_features, dtype=dtype).to(device), numbers(5, in_features, dtype=dtype).to(device)
    actual = linear_triton.linear_triton(x, weight, None)
    torch.testing.assert_close(actual.double(), F.linear(x.double(), weight.double()), atol=2e-2, rtol=2e-2)
    assert len(calls) == taken


@pytest.mark.parametrize(
    ("num_rows", "tiles"),
    [(16, [(128, 3), (256, 5), (128, 3)]), (32, [(128, 3), (128, 8), (128, 3)]), (64, [(128, 3), (128, 5), (128, 5)])],
)
def test_the_tiles_of_a_7b_model(num_rows, tiles) -> None:
    assert [tiles_for(num_rows, size) for size in (12288, 4096, 22016)] == [Tiles(*each) for each in tiles]


@pytest.mark.parametrize("num_rows", ROW_SIZES)
@pytest.mark.parametrize("out_features", [1, 5632, 5633, 11264, 11265, 16896, 16897, 1 << 20])
def test_all_tiles_fit_into_shared_memory(num_rows, out_features) -> None:
    tiles = tiles_for(num_rows, out_features)
    assert (64 + num_rows) * tiles.tile * 2 * tiles.stages <= 227 * 1024 - 1024, "of an H100, with room for barriers"
