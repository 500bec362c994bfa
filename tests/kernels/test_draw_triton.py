"""Triton's draw against a float64 reference, one row at a time, and against torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_vlm.kernels import draw_triton as module
from dist_vlm.kernels import sample
from dist_vlm.kernels.draw_triton import _bounds, _cut, draw_triton
from dist_vlm.kernels.philox import philox4x32, uniform_noise
from dist_vlm.kernels.sample import DrawRow
from dist_vlm.kernels.triton_support import triton_interpreted

# What float32 exponentials may shift a share of the mass by, or a probability beside another, near a threshold.
SLACK = 1e-5
# What two scores have to differ by for float32 to order them as float64 does.
CLEAR = 1e-4
TINY, MAX = (float(value) for value in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
# In which a program has loops of several turns, the last of them not full, and in which it has not even one full warp.
VOCABS = [1, 2, 5, 37, 128, 130, 1000, 2999]


@triton.jit
def _philox_kernel(seed, sample_index, position, words, quads: tl.constexpr):
    quad = tl.arange(0, quads)
    index, place = tl.load(sample_index).to(tl.uint32), tl.load(position).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(tl.load(seed), quad.to(tl.uint32), place, index, place * 0)
    tl.store(words + quad, word0.to(tl.int64))
    tl.store(words + quads + quad, word1.to(tl.int64))
    tl.store(words + 2 * quads + quad, word2.to(tl.int64))
    tl.store(words + 3 * quads + quad, word3.to(tl.int64))


@triton.jit
def _cut_kernel(row, vocab, temperature, top_k, top_p, out, threads: tl.constexpr):
    highest, far = _bounds(row, vocab, tl.load(temperature), 8 * threads)
    last, last_id = _cut(row, vocab, highest, tl.load(temperature), far, tl.load(top_k), tl.load(top_p), 2 * threads)
    tl.store(out, last.to(tl.int64))
    tl.store(out + 1, last_id.to(tl.int64))


def scaled_of(logits: Tensor, row: DrawRow) -> np.ndarray:
    """Of one row of logits, [vocab], as float32 rounds them."""
    x = logits.numpy()
    temperature = np.float32(min(max(row.temperature, TINY), MAX))
    with np.errstate(over="ignore"):
        return (x - x.max()) / temperature


def kept_within(logits: Tensor, row: DrawRow) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens must stay, and which may: sorted and added up in float64."""
    x = scaled_of(logits, row).astype(np.float64)
    if 0 < row.top_k < len(x):
        x = np.where(x < np.sort(x)[-row.top_k], -np.inf, x)
    weights, order = np.exp(x), np.argsort(-x, kind="stable")
    ordered = weights[order]
    share_before = np.empty_like(x)
    share_before[order] = (ordered.cumsum() - ordered) / ordered.sum()
    must, may = np.isfinite(x), np.isfinite(x)
    if row.top_p < 1:
        must &= share_before < row.top_p - SLACK
        may &= share_before < row.top_p + SLACK
        must[order[0]] = True
    if row.min_p > 0:
        must &= weights >= min(row.min_p * (1 + SLACK), 1.0)
        may &= weights >= row.min_p * (1 - SLACK)
    return must, may


def tokens_allowed(logits: Tensor, row: DrawRow) -> set[int]:
    """Those with the highest score, or so near it that float32 may choose them."""
    key = (torch.tensor([value]) for value in (row.seed, row.sample_index, row.position))
    noise = uniform_noise(*key, logits.shape[0])[0].numpy().astype(np.float64)
    score = scaled_of(logits, row).astype(np.float64) - np.log(-np.log(noise))
    must, may = kept_within(logits, row)
    return set(np.flatnonzero(may & (score >= score[must].max() - CLEAR)).tolist())


def check(logits: Tensor, rows: list[DrawRow], device: torch.device) -> None:
    tokens = draw_triton(logits.to(device), rows)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (len(rows),))
    for token, numbers, row in zip(tokens.tolist(), logits, rows, strict=True):
        assert token in tokens_allowed(numbers, row), row


def kept(logits: Tensor, row: DrawRow, device: torch.device) -> np.ndarray:
    """Which tokens the kernel keeps of one row, by top_k and top_p."""
    numbers, out = logits.to(device), torch.empty(2, dtype=torch.int64, device=device)
    temperature = min(max(row.temperature, TINY), MAX)
    _cut_kernel[(1,)](
        numbers,
        len(logits),
        torch.tensor([temperature], dtype=torch.float32, device=device),
        torch.tensor([row.top_k], dtype=torch.int64, device=device),
        torch.tensor([row.top_p], dtype=torch.float64, device=device),
        out,
        threads=1024 if device.type == "cuda" else 32,
        num_warps=32 if device.type == "cuda" else 1,
    )
    key, last_id = out.tolist()
    keys = np.abs(scaled_of(logits, row)).view(np.int32)
    return (keys < key) | ((keys == key) & (np.arange(len(keys)) <= last_id))


def make_logits(kind: str, vocab: int, seed: int) -> Tensor:
    noise = torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "plain":
            return noise * 3
        case "bfloat16":  # many equals, as a model in bfloat16 gives them
            return (noise * 3 + 10).to(torch.bfloat16).float()
        case "equal":
            return torch.full_like(noise, -7.0)
        case "few values":
            return noise.round()
        case "close":
            return noise * 1e-4 + 50
        case "wide":
            return noise * 1e3
        case "huge":
            return noise.sign() * 3e38
        case _:  # masked
            noise[noise < noise.median()] = -torch.inf
            return noise


KINDS = ["plain", "bfloat16", "equal", "few values", "close", "wide", "huge", "masked"]
DRAW_ROWS = st.builds(
    DrawRow,
    temperature=st.sampled_from([1e-300, 1e-40, 0.05, 0.7, 1.0, 2.5, 1e30, 1e300]) | st.floats(0.01, 10),
    top_k=st.sampled_from([0, 1, 2, 50]) | st.integers(0, 3000),
    top_p=st.sampled_from([1.0, 0.9, 1e-300, 0.5, 0.999999]) | st.floats(0.001, 1),
    min_p=st.sampled_from([0.0, 0.05, 1.0]) | st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    sample_index=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize(
    ("seed", "sample_index", "position"), [(0, 0, 0), (2**63 - 1, 2**32 - 1, 2**32 - 1), (2**40 + 3, 5, 70_000)]
)
def test_tritons_noise_has_the_bits_of_torchs(seed: int, sample_index: int, position: int, device: Any) -> None:
    """Of the words themselves, which `test_philox.py` compares with the paper's."""
    seed_, index, place = (torch.tensor([value], device=device) for value in (seed, sample_index, position))
    words = torch.empty((4, 64), dtype=torch.int64, device=device)
    _philox_kernel[(1,)](seed_, index, place, words, quads=64)
    quads = torch.arange(64, device=device)
    expected = philox4x32((quads, place, index, torch.zeros_like(place)), (seed_ & 0xFFFFFFFF, seed_ >> 32))
    assert torch.equal(words & 0xFFFFFFFF, torch.stack(torch.broadcast_tensors(*expected)))


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), vocab=st.sampled_from(VOCABS[:-1]), seed=st.integers(0, 1000), row=DRAW_ROWS)
@example(kind="bfloat16", vocab=2999, seed=1, row=DrawRow(0.7, top_p=0.9, seed=1))
@example(kind="few values", vocab=2999, seed=1, row=DrawRow(1.0, top_k=40, top_p=0.6, min_p=0.01, seed=2))
def test_the_token_is_that_of_a_float64_reference(kind: str, vocab: int, seed: int, row: DrawRow, device: Any) -> None:
    check(make_logits(kind, vocab, seed)[None], [row], device)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), vocab=st.sampled_from(VOCABS[:-1]), seed=st.integers(0, 1000), row=DRAW_ROWS)
@example(kind="bfloat16", vocab=2999, seed=1, row=DrawRow(0.7, top_p=0.9))
@example(kind="equal", vocab=2999, seed=1, row=DrawRow(0.7, top_p=0.37))
def test_what_is_kept_lies_within_a_float64_reference(
    kind: str, vocab: int, seed: int, row: DrawRow, device: Any
) -> None:
    logits, row = make_logits(kind, vocab, seed), row._replace(min_p=0.0)
    found, (must, may) = kept(logits, row, device), kept_within(logits, row)
    found &= np.isfinite(scaled_of(logits, row))
    assert not (must & ~found).any()
    assert not (found & ~may).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [0.35, 0.9, 0.99])
def test_what_is_kept_is_what_torch_keeps(kind: str, top_p: float, device: Any) -> None:
    """One token more or less where the share is reached: exponentials of float32 differ in their last bits."""
    logits = make_logits(kind, 1500, seed=9)
    for top_k in (0, 400):
        x = torch.from_numpy(scaled_of(logits, DrawRow(1.5)))[None]
        if top_k:
            x = sample.cut_top_k(x, torch.tensor([top_k]), most=top_k)
        x = sample.cut_top_p(x, torch.tensor([top_p], dtype=torch.float64))
        found = kept(logits, DrawRow(1.5, top_k=top_k, top_p=top_p), device)
        assert (torch.from_numpy(found) != x[0].isfinite()).sum() <= 1


def test_lower_ids_come_first_among_equals(device: Any) -> None:
    steps = torch.tensor([-1.0, 3.0, -1.0, 3.0, 3.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    assert np.flatnonzero(kept(steps, DrawRow(1.0, top_p=0.35), device)).tolist() == [1, 3]
    assert np.flatnonzero(kept(steps, DrawRow(1.0, top_k=2), device)).tolist() == [1, 3, 4]
    # Spread over several turns of the loop.
    for vocab, p in ((10, 0.35), (1000, 0.0625), (1000, 0.5), (1000, 0.9995)):
        found = kept(torch.zeros(vocab), DrawRow(1.0, top_p=p), device)
        assert np.flatnonzero(found).tolist() == list(range(int(np.ceil(vocab * p))))


def test_the_choice_is_the_lowest_id_among_equals(device: Any) -> None:
    """At the lowest temperature all but the highest logits are out of reach; the noise decides between those."""
    logits = torch.zeros(1, 300)
    logits[0, [40, 140, 299]] = 1.0
    tokens = {draw_triton(logits.to(device), [DrawRow(1e-300, seed=seed)]).item() for seed in range(24)}
    assert tokens == {40, 140, 299}
    assert draw_triton(logits.to(device), [DrawRow(1e-300, seed=5, top_k=1, top_p=0.1)]).item() == 40


def mixed_rows(count: int) -> list[DrawRow]:
    """Rows of every combination of cuts."""
    return [
        DrawRow(
            0.7 + i / count,
            top_k=(0, 5, 40)[i % 3],
            top_p=(1.0, 0.9)[i // 3 % 2],
            min_p=(0.0, 0.05)[i // 6 % 2],
            seed=i,
            position=100 + i,
        )
        for i in range(count)
    ]


def mixed_logits(count: int, vocab: int) -> Tensor:
    return torch.stack([make_logits(KINDS[i % len(KINDS)], vocab, seed=i) for i in range(count)])


@pytest.mark.parametrize("vocab", [1, 5, 130, 1000])
def test_a_row_alone_draws_what_it_draws_among_others(vocab: int, device: Any) -> None:
    logits, rows = mixed_logits(12, vocab).to(device), mixed_rows(12)
    together = draw_triton(logits, rows).tolist()
    assert [draw_triton(logits[i : i + 1], [rows[i]]).item() for i in range(12)] == together
    order = [7, 2, 11]
    assert draw_triton(logits[order], [rows[i] for i in order]).tolist() == [together[i] for i in order]


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_a_program_of_any_size_draws_the_same(threads: int, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = mixed_logits(12, 900).to(device), mixed_rows(12)
    expected = draw_triton(logits, rows)
    monkeypatch.setattr(module, "_THREADS", threads)
    assert torch.equal(draw_triton(logits, rows), expected)


def test_strided_rows(device: Any) -> None:
    wide = torch.full((24, 700), 1e4)
    wide[::2, 5:600] = mixed_logits(12, 595)
    rows, dense = mixed_rows(12), wide[::2, 5:600].clone().to(device)
    wide = wide.to(device)
    assert torch.equal(draw_triton(wide[::2, 5:600], rows), draw_triton(dense, rows))
    expanded = draw_triton(dense[:1].expand(12, -1), rows)
    assert torch.equal(expanded, draw_triton(dense[:1].repeat(12, 1), rows))


def test_tokens_are_those_that_torch_draws(device: Any) -> None:
    """Of inputs for which none of the scores lie so near each other that they differ."""
    logits, rows = mixed_logits(24, 501), mixed_rows(24)
    check(logits, rows, device)
    assert draw_triton(logits.to(device), rows).tolist() == sample.draw(logits, rows).tolist()


def test_draws_follow_the_softmax_of_what_is_kept(device: Any) -> None:
    """Above the 1 - 10^-4 quantile of chi-square with 5 degrees of freedom lies 25.8; the seed is fixed."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 1.5, -torch.inf, 0.25])
    count = 120 if triton_interpreted() else 40_000
    row = DrawRow(1.3, top_k=7, top_p=0.93, min_p=0.2, seed=3)
    must, may = kept_within(logits, row)
    assert (must == may).all() and must.sum() == 6
    expected = np.where(must, np.exp(logits.numpy().astype(np.float64) / row.temperature), 0)
    expected *= count / expected.sum()
    tokens = draw_triton(logits.to(device).expand(count, -1), [row._replace(position=i) for i in range(count)])
    counts = torch.bincount(tokens.cpu(), minlength=8).numpy()
    assert counts[~must].sum() == 0
    assert ((counts[must] - expected[must]) ** 2 / expected[must]).sum() < 25.8


def test_masked_tokens_are_never_drawn(device: Any) -> None:
    logits = torch.full((6, 200), -torch.inf)
    logits[:, 77], logits[:3, 199] = -3.0, -3.0
    rows = [DrawRow(1e300), DrawRow(1.0, top_k=9), DrawRow(1.0, top_k=1, top_p=0.99), DrawRow(1e-300, top_p=0.3)]
    rows += [DrawRow(1.0, min_p=1.0), DrawRow(2.0, top_k=199, top_p=0.5, min_p=0.5)]
    found = draw_triton(logits.to(device), rows).tolist()
    assert set(found[:3]) <= {77, 199} and found[3:] == [77] * 3


def test_min_p_keeps_those_likely_enough_beside_the_likeliest(device: Any) -> None:
    logits = torch.tensor([[-1.0, 0.0, -0.5, 0.0]]).to(device)
    for min_p, expected in ((1.0, {1, 3}), (0.61, {1, 3}), (0.6, {1, 2, 3}), (0.36, {0, 1, 2, 3})):
        tokens = draw_triton(logits.expand(40, -1), [DrawRow(1.0, min_p=min_p, position=i) for i in range(40)])
        assert set(tokens.tolist()) == expected


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_of_numbers_gives_some_token_and_changes_no_other(value: float, device: Any) -> None:
    logits, rows = mixed_logits(12, 300), mixed_rows(12)
    rows[2], rows[7] = DrawRow(1.0, top_k=3), DrawRow(0.5, top_k=20, top_p=0.3, min_p=0.1)
    expected = draw_triton(logits.to(device), rows).tolist()
    logits[2], logits[4], logits[7, 3:290], logits[10, 299] = value, value, value, value
    found = draw_triton(logits.to(device), rows).tolist()
    assert all(0 <= token < 300 for token in found)
    others = [i for i in range(12) if i not in (2, 4, 7, 10)]
    assert [found[i] for i in others] == [expected[i] for i in others]


def test_no_rows_have_no_tokens(device: Any) -> None:
    assert draw_triton(torch.zeros(0, 9, device=device), []).tolist() == []


@pytest.mark.parametrize(
    ("logits", "count", "error", "message"),
    [
        (torch.zeros(3), 3, ValueError, r"draw: logits has shape \[3\], must be \[3, any\]"),
        (torch.zeros(2, 5), 3, ValueError, r"draw: logits has shape \[2, 5\], must be \[3, any\]"),
        (torch.zeros(2, 0), 2, ValueError, "must have at least one column"),
        (torch.zeros(4, 6).T, 6, ValueError, "its last axis must be dense"),
        (torch.zeros(2, 3).to(torch.bfloat16), 2, TypeError, "logits has dtype torch.bfloat16, must be torch.float32"),
    ],
)
def test_wrong_arguments_are_named(logits: Tensor, count: int, error: Any, message: str, device: Any) -> None:
    with pytest.raises(error, match=message):
        draw_triton(logits.to(device), [DrawRow(1.0)] * count)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32000, 128256])
def test_great_vocabularies_on_a_gpu(vocab: int, device: Any) -> None:
    logits, rows = mixed_logits(48, vocab), mixed_rows(48)
    check(logits, rows, device)
    for numbers, row in zip(logits, rows, strict=True):
        must, may = kept_within(numbers, row._replace(min_p=0.0))
        found = kept(numbers, row, device) & np.isfinite(scaled_of(numbers, row))
        assert not (must & ~found).any() and not (found & ~may).any()
    together = draw_triton(logits.to(device), rows).tolist()
    assert [draw_triton(logits[i : i + 1].to(device), [rows[i]]).item() for i in range(48)] == together


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32000, 128256])
def test_torch_draws_the_same_on_a_gpu(vocab: int, device: Any) -> None:
    logits, rows = mixed_logits(48, vocab), mixed_rows(48)
    found = draw_triton(logits.to(device), rows).tolist()
    expected = sample.draw(logits.to(device), rows).tolist()
    for i in range(48):
        allowed = tokens_allowed(logits[i], rows[i])
        assert found[i] == expected[i] or {found[i], expected[i]} <= allowed, i


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for(device: Any) -> None:
    logits, rows = mixed_logits(24, 32003).to(device), mixed_rows(24)
    expected = draw_triton(logits, rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = draw_triton(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
