"""All-gather: every rank sends its part to all others, and each lays them out as they are wanted."""

from __future__ import annotations

import triton
import triton.language as tl

from dist_vlm.kernels.all_reduce.in_band_triton import (
    bits_of,
    buffer_of,
    current_call,
    empty_last,
    end_call,
    wait_for,
    words_of,
)
from dist_vlm.kernels.early_start_triton import await_previous, start_next


@triton.jit(do_not_specialize=["rank", "num_rows", "limit"])
def all_gather_kernel(
    part,
    out,
    addresses,
    state,
    error,
    report,
    rank,
    num_rows,
    count,
    width,
    part_stride,
    out_row_stride,
    out_part_stride,
    capacity,
    limit,
    world_size: tl.constexpr,
    lanes: tl.constexpr,
    tile: tl.constexpr,
    bits: tl.constexpr,
    early: tl.constexpr = False,
):
    """part: [num_rows, count] of each rank, rows `part_stride` apart. Column c of row r of rank s goes to
    out[r * out_row_stride + s * out_part_stride + c], unless s * count + c >= width, in the dtype of `out`.

    Layout of a buffer: [world_size, num_rows, count].
    """
    start_next(early)
    await_previous(early)
    kind: tl.constexpr = part.dtype.element_ty
    call = current_call(state)
    first, stride = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, tile)
    row_tiles = tl.cdiv(count, tile)
    part_size = tl.cast(num_rows, tl.int64) * count
    for item in range(first, num_rows * row_tiles, stride):
        row = tl.cast(item // row_tiles, tl.int64)
        column = (item % row_tiles) * tile + columns
        inside = column < count
        sent = bits_of(tl.load(part + row * part_stride + column, mask=inside, other=0.0), bits)
        for step in tl.static_range(world_size):
            theirs = buffer_of(addresses, (rank + step) % world_size, call, capacity, bits)
            tl.store(theirs + rank * part_size + row * count + column, sent, mask=inside)
    tl.debug_barrier()  # nothing of what was sent is kept back while this program waits
    empty_last(addresses, state, rank, call, capacity)
    own = buffer_of(addresses, rank, call, capacity, bits)
    ranks = tl.arange(0, lanes)[:, None]
    for item in range(first, num_rows * row_tiles, stride):
        row = tl.cast(item // row_tiles, tl.int64)
        column = (item % row_tiles) * tile + columns[None, :]
        wanted = (ranks < world_size) & (column < count)
        places = own + ranks * part_size + row * count + column
        wait_for(places, wanted, error, report, limit, bits)
        numbers = tl.load(places, mask=wanted, other=0, volatile=True).to(kind, bitcast=True)
        kept = wanted & (ranks * count + column < width)
        target = out + row * out_row_stride + ranks.to(tl.int64) * out_part_stride + column
        tl.store(target, numbers.to(out.dtype.element_ty), mask=kept)
    end_call(state, call, words_of(world_size * part_size, bits))
