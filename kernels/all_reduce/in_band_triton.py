"""What the kernels have in common: the protocol of `dist_vlm.kernels.all_reduce`, of its readers and its writers.

Offsets and sizes are in elements of the data's dtype; numbers travel as their bits, int16 or int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dist_vlm.kernels.all_reduce import peer_buffers

EMPTY = tl.constexpr(peer_buffers.EMPTY)
MAX_PROGRAMS = tl.constexpr(peer_buffers.MAX_PROGRAMS)
NUM_BUFFERS = tl.constexpr(peer_buffers.NUM_BUFFERS)
CLEARED_WORDS = tl.constexpr(peer_buffers.CLEARED_WORDS)
ALIGNMENT = tl.constexpr(16)  # bytes: what a thread reads or writes at once


@triton.jit
def bits_of(numbers, bits: tl.constexpr):
    """The numbers as they travel."""
    raw = numbers.to(bits, bitcast=True)
    empty: tl.constexpr = EMPTY if bits == tl.int32 else EMPTY >> 16
    return tl.where(raw == empty, tl.zeros_like(raw), raw)


@triton.jit
def current_call(state):
    """The number of this call, the same in all programs of all ranks."""
    return tl.load(state + tl.program_id(0))


@triton.jit
def buffer_of(addresses, rank, call, capacity, bits: tl.constexpr):
    """Where a rank's buffer for this call begins. capacity: bytes of one buffer."""
    address = tl.load(addresses + rank) + (call % NUM_BUFFERS) * capacity
    return tl.multiple_of(address.to(tl.pointer_type(bits)), ALIGNMENT)


@triton.jit
def empty_last(addresses, state, rank, call, capacity):
    """Empties what the call before has used of this rank's memory, and a little beyond: that is empty already."""
    last = (call + NUM_BUFFERS - 1) % NUM_BUFFERS
    used = tl.load(state + MAX_PROGRAMS + last)
    words = buffer_of(addresses, rank, last, capacity, tl.int32)
    places = tl.arange(0, CLEARED_WORDS)
    empty = tl.full((CLEARED_WORDS,), EMPTY, tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(used, CLEARED_WORDS), tl.num_programs(0)):
        tl.store(words + tl.cast(block, tl.int64) * CLEARED_WORDS + places, empty)


@triton.jit
def wait_for(places, wanted, error, report, limit, bits: tl.constexpr):
    """Looks at the places of a tile [ranks, columns] until none that is wanted is empty, `limit` times at most."""
    empty: tl.constexpr = EMPTY if bits == tl.int32 else EMPTY >> 16
    seen = tl.load(places, mask=wanted, other=0, volatile=True)
    missing = tl.max((seen == empty).to(tl.int32), axis=1)
    looks = 1
    if tl.max(missing, axis=0) != 0:
        # Once a call has given up, none waits: a recorded step has some hundred of them.
        limit = tl.where(tl.load(error) != 0, 0, limit)
        while (tl.max(missing, axis=0) != 0) & (looks < limit):
            seen = tl.load(places, mask=wanted, other=0, volatile=True)
            missing = tl.max((seen == empty).to(tl.int32), axis=1)
            looks += 1
        if tl.max(missing, axis=0) != 0:
            ranks = tl.arange(0, missing.shape[0])
            missed = tl.sum(missing << ranks, axis=0)
            # The first to give up is told of: the others may have missed whoever waited for the same rank.
            if tl.atomic_cas(error, 0, 1) == 0:
                tl.store(report, missed)  # one word: the host may read at any time


@triton.jit
def summed_parts(places, part_size, inside, kind: tl.constexpr, world_size: tl.constexpr, wide: tl.constexpr):
    """Parts that have arrived, added up in float32 in rank order and rounded once to `kind`."""
    total = tl.zeros((wide,), tl.float32)
    for peer in tl.static_range(world_size):
        part = tl.load(places + peer * part_size, mask=inside, other=0, volatile=True)
        total += part.to(kind, bitcast=True).to(tl.float32)
    return total.to(kind)


@triton.jit
def words_of(num_elements, bits: tl.constexpr):
    """32-bit words that so many elements reach into."""
    return (num_elements * (bits.primitive_bitwidth // 8) + 3) // 4


@triton.jit
def end_call(state, call, used):
    """Counts the call. used: 32-bit words of each buffer that it wrote."""
    tl.debug_barrier()  # every thread has read the number
    program = tl.program_id(0)
    programs = tl.arange(0, MAX_PROGRAMS)
    tl.store(state + programs, call + 1, mask=programs % tl.num_programs(0) == program)
    if program == 0:
        tl.store(state + MAX_PROGRAMS + call % NUM_BUFFERS, used)
