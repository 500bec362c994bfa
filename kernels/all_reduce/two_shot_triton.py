"""All-reduce in which each rank adds up a share of the rows and sends their sums to all others: for many bytes.

A rank sends each number twice, whatever the number of ranks, where one shot sends it to every other rank. Row i is
added up by rank i mod world_size; group g is the rows g * world_size and on, one of each rank, and a program has groups
of its own. The reduction and the sending of the sums are Rabenseifner's reduce-scatter and all-gather (2004).
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
def two_shot_kernel(
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
    """Layout of a buffer: parts of this rank's rows, [world_size, groups, hidden]; then all sums, [num_rows, hidden].

    The arguments are those of `one_shot_kernel`.
    """
    start_next(early)
    await_previous(early)
    kind: tl.constexpr = summed.dtype.element_ty
    call = current_call(state)
    first, stride = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, wide)
    num_groups = tl.cdiv(num_rows, world_size)
    share_size = tl.cast(num_groups, tl.int64) * hidden
    for group in range(first, num_groups, stride):
        for step in tl.static_range(world_size):
            peer = (rank + step) % world_size
            row = group * world_size + peer
            place = tl.cast(row, tl.int64) * hidden
            inside = (columns < hidden) & (tl.full((wide,), row, tl.int32) < num_rows)
            if ragged:
                inside = inside & (place + columns < num_elements)
            sent = bits_of(tl.load(partial + place + columns, mask=inside, other=0.0), bits)
            theirs = buffer_of(addresses, peer, call, capacity, bits) + rank * share_size
            tl.store(theirs + tl.cast(group, tl.int64) * hidden + columns, sent, mask=inside)
    tl.debug_barrier()  # nothing of what was sent is kept back while this program waits
    empty_last(addresses, state, rank, call, capacity)
    own = buffer_of(addresses, rank, call, capacity, bits)
    ranks = tl.arange(0, lanes)[:, None]
    sums = world_size * share_size
    for group in range(first, num_groups, stride):
        row = group * world_size + rank
        place = tl.cast(row, tl.int64) * hidden
        parts = own + tl.cast(group, tl.int64) * hidden
        for start in tl.static_range(0, wide, looked):
            some = start + tl.arange(0, looked)[None, :]
            wanted = (ranks < world_size) & (some < hidden) & (tl.full((1, 1), row, tl.int32) < num_rows)
            if ragged:
                wanted = wanted & (place + some < num_elements)
            wait_for(parts + ranks * share_size + some, wanted, error, report, limit, bits)
        inside = (columns < hidden) & (tl.full((wide,), row, tl.int32) < num_rows)
        if ragged:
            inside = inside & (place + columns < num_elements)
        total = summed_parts(parts + columns, share_size, inside, kind, world_size, wide)
        sent = bits_of(total, bits)
        for step in tl.static_range(world_size):
            theirs = buffer_of(addresses, (rank + step) % world_size, call, capacity, bits) + sums
            tl.store(theirs + place + columns, sent, mask=inside)
    tl.debug_barrier()
    for group in range(first, num_groups, stride):
        for start in tl.static_range(0, wide, looked):
            some = start + tl.arange(0, looked)[None, :]
            rows = group * world_size + ranks
            spots = rows.to(tl.int64) * hidden + some
            wanted = (ranks < world_size) & (some < hidden) & (rows < num_rows)
            if ragged:
                wanted = wanted & (spots < num_elements)
            wait_for(own + sums + spots, wanted, error, report, limit, bits)
        for step in tl.static_range(world_size):
            row = group * world_size + step
            place = tl.cast(row, tl.int64) * hidden
            inside = (columns < hidden) & (tl.full((wide,), row, tl.int32) < num_rows)
            if ragged:
                inside = inside & (place + columns < num_elements)
            arrived = tl.load(own + sums + place + columns, mask=inside, other=0, volatile=True)
            total = arrived.to(kind, bitcast=True)
            add_norm_row(total, row, columns, inside, residual, residual_stride, weight, summed, normed, eps, hidden)
    end_call(state, call, words_of(sums + tl.cast(num_rows, tl.int64) * hidden, bits))
