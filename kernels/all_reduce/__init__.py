"""Collectives of one node's GPUs over memory that the ranks write into each other's, without a barrier.

    total = sum over ranks s of part_s, in float32 in rank order from 0, rounded once to the dtype
    all_reduce:       part [...] -> total, the same bits on every rank
    reduce_add_norm:  `dist_vlm.kernels.reduce_add_norm` of that total, in the same kernel
    all_gather:       part [...] -> [world_size, ...], the ranks' parts in rank order

The data are their own flags. A buffer that waits for data is full of one bit pattern, `EMPTY`; a rank writes its
numbers into the buffers of all ranks, and a reader looks at a place until something else stands there. A number whose
bits are that pattern is sent as zero: negative zero in 16 bits, a denormal number of 4.6e-41 in float32.

Every rank has three buffers, which the calls of a group take in turn. Call n uses buffer n mod 3, and empties buffer n
- 1. That one is free: this rank read it in call n - 1, whose kernel has ended, since a kernel does nothing before the
one before it in its stream has (`await_previous`). Nor does a rank write into it before it is empty: a peer writes
there next in call n + 2, which starts when the peer's call n + 1 has ended, which needs what this rank sent in call n +
1, which it sent when its own call n had ended. Each number travels once, so the smallest call waits for one way over
the link, where a barrier waits for two. The pattern is known as Lamport's from NVIDIA's inference libraries; the safety
argument is the one of his bounded buffer (Lamport, "Proving the Correctness of Multiprocess Programs", 1977).

How far a rank is, it reads from device memory, so a recorded call may be replayed at any time, as long as all ranks
make the same calls in the same order. A stream that may run beside another needs buffers of its own.

A reader gives up after a bounded number of looks and reports which ranks it missed; every later call of the rank gives
up at its first look. What these return means nothing, and the group is not to be used again.
"""
