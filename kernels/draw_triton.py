"""The draw of one token a row, in Triton: `kernels/sample.py`'s draw, with its cuts and its noise, as one kernel.

A program has one row. It passes over the row once for the highest and the lowest logit, a few times for each of top_k
and top_p where the row asks for them, and once for the noise and the choice; a row of 128 KiB stays in the L2 cache.

Thresholds are found without sorting, by the distances of logits from the highest,

    key_v = the bits of (highest - logit_v) / temperature,   31 of them, in the order of the distances,

as the lowest key up to which enough tokens lie: k of them, or a share p of their mass in fixed point (`top_p.py`). Each
pass adds up to four keys between the bounds, and narrows the bounds to keys that are there. Sums are of integers: a
row's token depends on nothing but the row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.checks import check_dtype, check_rows, check_shape
from dist_vlm.kernels.sample import DrawRow
from dist_vlm.kernels.upload import to_device

# Of a program. With more logits a thread at once than two, the sums of a search do not fit its 64 registers.
_THREADS = 1024
_WARP = 32
_FLOAT = np.finfo(np.float32)
# Of a row: top_k, seed, sample_index, position; and the bits of temperature, top_p, min_p in float64.
_NUM_SETTINGS = 7
_ONE = tl.constexpr(2.0**40)
_INFINITY = tl.constexpr(0x7F800000)
_LAST_KEY = tl.constexpr(0x7FFFFFFF)
_OCTAVE = tl.constexpr(1 << 23)
# The distance 28: from there on nothing weighs 2**-40 of the likeliest token.
_WEIGHTLESS = tl.constexpr(0x41E00000)
# Passes that may cut the bounds' distances evenly, and not their keys, of which most are of tiny distances.
_EVEN_PASSES = tl.constexpr(4)


def check_inputs(logits: Tensor, rows: Sequence[DrawRow]) -> None:
    op = "draw"
    check_shape(op, "logits", logits, (len(rows), None))
    check_dtype(op, "logits", logits, torch.float32)
    check_rows(op, "logits", logits)
    if logits.shape[1] == 0:
        raise ValueError(f"{op}: logits has shape {list(logits.shape)}, must have at least one column")


def draw_triton(logits: Tensor, rows: Sequence[DrawRow]) -> Tensor:
    """Draws one token a row.

    logits: float32 [R, vocab], finite or -inf, with a finite one in each row; rows may be strided. rows: R of them.
    Returns int64 [R]. A row that is not of such numbers gives some id of the vocabulary and changes no other.
    """
    check_inputs(logits, rows)
    return launch(logits, to_device(settings_of(rows), logits.device))


def settings_of(rows: Sequence[DrawRow]) -> np.ndarray:
    """int64 [7, R], one upload for all; temperatures within float32, so that a quotient is never 0/0 or inf/inf."""
    if not rows:
        return np.empty((_NUM_SETTINGS, 0), dtype=np.int64)
    temperature, top_k, top_p, min_p, seed, sample_index, position = zip(*rows, strict=True)
    numbers = np.array((temperature, top_p, min_p), dtype=np.float64)
    numbers[0] = numbers[0].clip(_FLOAT.tiny, _FLOAT.max)
    integers = np.array((top_k, seed, sample_index, position), dtype=np.int64)
    return np.concatenate((integers, numbers.view(np.int64)))


def launch(logits: Tensor, settings: Tensor) -> Tensor:
    """`draw_triton`, of settings that the device has."""
    num_rows, vocab = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        threads = max(_WARP, min(_THREADS, triton.next_power_of_2(triton.cdiv(vocab, 4))))
        _draw_kernel[(num_rows,)](
            logits,
            logits.stride(0),
            vocab,
            settings,
            tokens,
            threads=threads,
            num_warps=threads // _WARP,
        )
    return tokens


# One kernel for every batch, however its rows lie and whatever they ask.
@triton.jit(do_not_specialize=["logits", "stride", "vocab", "settings", "tokens"])
def _draw_kernel(logits, stride, vocab, settings, tokens, threads: tl.constexpr):
    index, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row = logits + index * stride
    settings += index
    top_k = tl.load(settings)
    temperature = tl.load(settings + 4 * num_rows).to(tl.float64, bitcast=True).to(tl.float32)
    top_p = tl.load(settings + 5 * num_rows).to(tl.float64, bitcast=True)

    highest, far = _bounds(row, vocab, temperature, 8 * threads)
    last, last_id = _cut(row, vocab, highest, temperature, far, top_k, top_p, 2 * threads)
    token = _choose(row, vocab, highest, temperature, last, last_id, settings, threads)
    tl.store(tokens + index, token.to(tl.int64))


@triton.jit
def _bounds(row, vocab, temperature, tile: tl.constexpr):
    """The highest logit, and the key of the lowest that is finite."""
    lanes = tl.arange(0, tile)
    high = tl.full((tile,), float("-inf"), tl.float32)
    low = tl.full((tile,), float("inf"), tl.float32)
    for start in range(0, vocab, tile):
        columns = start + lanes
        x = tl.load(row + columns, mask=columns < vocab, other=float("-inf"))
        high = tl.where(x > high, x, high)
        low = tl.where((x < low) & (x > float("-inf")), x, low)
    highest = tl.max(high, axis=0)
    return highest, tl.minimum(_key(tl.min(low, axis=0), highest, temperature), _INFINITY)


@triton.jit
def _key(x, highest, temperature):
    # Without the sign, which a NaN may have: its key is above those of all numbers.
    return tl.div_rn(highest - x, temperature).to(tl.int32, bitcast=True) & _LAST_KEY


@triton.jit
def _keys(row, columns, vocab, highest, temperature):
    """Those past the vocabulary are as unlikely as -inf."""
    x = tl.load(row + columns, mask=columns < vocab, other=float("-inf"))
    return _key(x, highest, temperature)


@triton.jit
def _weight(key):
    """Probability beside that of the likeliest token, in fixed point."""
    return (tl.exp(-key.to(tl.float32, bitcast=True)) * _ONE).to(tl.int64)


@triton.jit
def _cut(row, vocab, highest, temperature, far, top_k, top_p, tile: tl.constexpr):
    """(key, id): what stays has a lower key, or that key and at most that id."""
    last = tl.full([], _INFINITY, tl.int32)
    last_id = vocab
    if (top_k > 0) & (top_k < vocab):
        last, _, _, _ = _search(row, vocab, highest, temperature, far, top_k.to(tl.float64), False, tile)
    if top_p < 1:
        far = tl.minimum(tl.minimum(far, last), _WEIGHTLESS)
        last, before, after, wanted = _search(row, vocab, highest, temperature, far, top_p, True, tile)
        weight = _weight(last)
        if (after - weight).to(tl.float64) >= wanted:
            last_id = _last_of_equals(row, vocab, highest, temperature, last, before, weight, wanted, tile)
    return last, last_id


@triton.jit
def _search(row, vocab, highest, temperature, far, amount, by_mass: tl.constexpr, tile: tl.constexpr):
    """(key, before, after, wanted): the lowest key up to which the row's tokens come to what is wanted, what the lower
    keys come to, and what those up to it do.

    far: no key above it counts. amount: float64, the number of tokens wanted, or of the mass up to `far` the share.
    Where there are fewer tokens, the key is `far`.
    """
    lanes = tl.arange(0, tile)
    # Keys up to `low` come to `before`, less than what is wanted; keys up to `high` to `after`, not less.
    low, high = tl.full([], -1, tl.int32), far
    before, after = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    wanted = amount
    turn = tl.full([], 0, tl.int32)
    searching = turn == 0
    while searching:
        # The first pass has `far` as its last point; later ones know what the keys up to `high` come to.
        parts = tl.where(turn == 0, 4, 5)
        is_even = (turn < _EVEN_PASSES) & (high - low > _OCTAVE)
        point1 = _point(low, high, 1, parts, is_even)
        point2 = _point(low, high, 2, parts, is_even)
        point3 = _point(low, high, 3, parts, is_even)
        point4 = tl.where(turn == 0, high, _point(low, high, 4, parts, is_even))
        zeros = tl.zeros((tile,), tl.int64 if by_mass else tl.int32)
        sum1, sum2, sum3, sum4 = zeros, zeros, zeros, zeros
        nearest = tl.full((tile,), _LAST_KEY, tl.int32)
        farthest = tl.full((tile,), -1, tl.int32)
        for start in range(0, vocab, tile):
            keys = _keys(row, start + lanes, vocab, highest, temperature)
            weights = _weight(keys) if by_mass else zeros + 1
            sum1 += tl.where(keys <= point1, weights, 0)
            sum2 += tl.where(keys <= point2, weights, 0)
            sum3 += tl.where(keys <= point3, weights, 0)
            sum4 += tl.where(keys <= point4, weights, 0)
            inside = (keys > low) & (keys <= high)
            nearest = tl.minimum(nearest, tl.where(inside, keys, _LAST_KEY))
            farthest = tl.maximum(farthest, tl.where(inside, keys, -1))
        upto1, upto2 = tl.sum(sum1, axis=0).to(tl.int64), tl.sum(sum2, axis=0).to(tl.int64)
        upto3, upto4 = tl.sum(sum3, axis=0).to(tl.int64), tl.sum(sum4, axis=0).to(tl.int64)
        if by_mass:
            wanted = tl.where(turn == 0, amount * upto4.to(tl.float64), wanted)
        low, high, before, after = _narrowed(low, high, before, after, point4, upto4, wanted)
        low, high, before, after = _narrowed(low, high, before, after, point3, upto3, wanted)
        low, high, before, after = _narrowed(low, high, before, after, point2, upto2, wanted)
        low, high, before, after = _narrowed(low, high, before, after, point1, upto1, wanted)
        # To keys that are there: none lies between.
        low = tl.maximum(low, tl.min(nearest, axis=0) - 1)
        high = tl.minimum(high, tl.max(farthest, axis=0))
        turn += 1
        searching = high - low > 1
    return high, before, after, wanted


@triton.jit
def _point(low, high, number, parts, is_even):
    """The key after `number` of equal parts between two others: of their distances, or of the keys themselves."""
    begin = tl.maximum(low, 0).to(tl.float32, bitcast=True)
    width = high.to(tl.float32, bitcast=True) - begin
    even = (begin + width * (number / parts)).to(tl.int32, bitcast=True)
    key = (low + (high - low).to(tl.int64) * number // parts).to(tl.int32)
    return tl.minimum(tl.maximum(tl.where(is_even, even, key), low), high)


@triton.jit
def _narrowed(low, high, before, after, point, upto, wanted):
    """The bounds with one of them at a point between them."""
    is_enough = upto.to(tl.float64) >= wanted
    is_lower = is_enough & (point <= high)
    is_higher = (is_enough == 0) & (point > low)
    return (
        tl.where(is_higher, point, low),
        tl.where(is_lower, point, high),
        tl.where(is_higher, upto, before),
        tl.where(is_lower, upto, after),
    )


@triton.jit
def _last_of_equals(row, vocab, highest, temperature, key, before, weight, wanted, tile: tl.constexpr):
    """The last id, of the tokens with one key, before which less than what is wanted lies: not the last of them."""
    # `count` of them stay, fewer than `more`.
    count, more = tl.full([], 1, tl.int32), vocab
    while more - count > 1:
        middle = (count + more) // 2
        stays = (before + (middle - 1).to(tl.int64) * weight).to(tl.float64) < wanted
        count, more = tl.where(stays, middle, count), tl.where(stays, more, middle)
    lanes = tl.arange(0, tile)
    # The tile that has the last one, and how many are in those before it.
    begin, skipped, seen = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, vocab, tile):
        is_before = seen < count
        begin, skipped = tl.where(is_before, start, begin), tl.where(is_before, seen, skipped)
        seen += tl.sum((_keys(row, start + lanes, vocab, highest, temperature) == key).to(tl.int32), axis=0)
    is_equal = _keys(row, begin + lanes, vocab, highest, temperature) == key
    number = skipped + tl.cumsum(is_equal.to(tl.int32), axis=0)
    return tl.max(tl.where(is_equal & (number <= count), begin + lanes, -1), axis=0)


@triton.jit
def _choose(row, vocab, highest, temperature, last, last_id, settings, quads: tl.constexpr):
    """The token with the highest sum of logit and noise, the lowest id among equals."""
    num_rows = tl.num_programs(0)
    seed = tl.load(settings + num_rows)
    sample_index = tl.load(settings + 2 * num_rows).to(tl.uint32)
    position = tl.load(settings + 3 * num_rows).to(tl.uint32)
    min_p = tl.load(settings + 6 * num_rows).to(tl.float64, bitcast=True).to(tl.float32)
    lanes = tl.arange(0, quads)
    # Of each lane: its highest, and the first place of it.
    best = tl.full((quads,), float("-inf"), tl.float32)
    place = tl.minimum(lanes, vocab - 1)
    for start in range(0, tl.cdiv(vocab, 4), quads):
        quad = start + lanes
        # One counter's words are the noise of four columns.
        word, word1, word2, word3 = tl.philox(seed, quad.to(tl.uint32), position, sample_index, position * 0)
        for number in tl.static_range(4):
            columns = 4 * quad + number
            keys = _keys(row, columns, vocab, highest, temperature)
            x = -keys.to(tl.float32, bitcast=True)
            stays = (keys < last) | ((keys == last) & (columns <= last_id))
            stays = stays & (tl.exp(x) >= min_p)
            uniform = ((word >> 9).to(tl.float32) + 0.5) * (1.0 / (1 << 23))
            score = tl.where(stays, x - tl.log(-tl.log(uniform)), float("-inf"))
            is_higher = score > best
            best = tl.where(is_higher, score, best)
            place = tl.where(is_higher, columns, place)
            word, word1, word2, word3 = word1, word2, word3, word
    return tl.min(tl.where(best == tl.max(best, axis=0), place, vocab), axis=0)
