"""All-reduce in which every rank sends its whole part to all others and adds up for itself: for few bytes.

Each program has rows of its own, and sends all of them before it waits for the first: no rank's programs ever wait for
ones that have not got a place on a device yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dist_vlm.kernels.all_reduce.in_band_triton import (
    bits_of,
    buffer_of,
    current_call,
    empty_last,
    end_call,
    summed_parts,
    wait_for,
    words_of,
)
from dist_vlm.kernels.all_reduce.rows_triton import add_norm_row
from dist_vlm.kernels.early_start_triton import await_previous, start_next


@triton.jit(do_not_specialize=["rank", "num_rows", "num_elements", "limit"])
def one_shot_kernel(
    partial,
    residual,
    weight,
    summed,
    normed,
    addresses,
    state,
    error,
    report,
    rank,
    num_rows,
    num_elements,
    capacity,
    limit,
    residual_stride,
    eps,
    world_size: tl.constexpr,
    lanes: tl.constexpr,
    hidden: tl.constexpr,
    wide: tl.constexpr,
    looked: tl.constexpr,
    ragged: tl.constexpr,
    bits: tl.constexpr,
    early: tl.constexpr = False,
):
    """Layout of a buffer: [world_size, num_rows, hidden], the parts in rank order.

    lanes: `world_size` to the next power of 2. wide: `hidden` likewise. looked: columns waited for at once.
    ragged: whether the last row is cut off at `num_elements`. weight None: the sum alone.
    """
    start_next(early)
    await_previous(early)
    kind: tl.constexpr = summed.dtype.element_ty
    call = current_call(state)
    first, stride = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, wide)
    part_size = tl.cast(num_rows, tl.int64) * hidden
    for row in range(first, num_rows, stride):
        place = tl.cast(row, tl.int64) * hidden
        inside = columns < hidden
        if ragged:
            inside = inside & (place + columns < num_elements)
        sent = bits_of(tl.load(partial + place + columns, mask=inside, other=0.0), bits)
        for step in tl.static_range(world_size):
            # Each rank begins with itself, so that they do not all write to the same one.
            theirs = buffer_of(addresses, (rank + step) % world_size, call, capacity, bits)
            tl.store(theirs + rank * part_size + place + columns, sent, mask=inside)
    tl.debug_barrier()  # nothing of what was sent is kept back while this program waits
    empty_last(addresses, state, rank, call, capacity)
    own = buffer_of(addresses, rank, call, capacity, bits)
    ranks = tl.arange(0, lanes)[:, None]
    for row in range(first, num_rows, stride):
        place = tl.cast(row, tl.int64) * hidden
        for start in tl.static_range(0, wide, looked):
            some = start + tl.arange(0, looked)[None, :]
            wanted = (ranks < world_size) & (some < hidden)
            if ragged:
                wanted = wanted & (place + some < num_elements)
            wait_for(own + ranks * part_size + place + some, wanted, error, report, limit, bits)
        inside = columns < hidden
        if ragged:
            inside = inside & (place + columns < num_elements)
        total = summed_parts(own + place + columns, part_size, inside, kind, world_size, wide)
        add_norm_row(total, row, columns, inside, residual, residual_stride, weight, summed, normed, eps, hidden)
    end_call(state, call, words_of(world_size * part_size, bits))
