import pytest

from dist_vlm.sched.block_pool import BlockPool, BooksError


def test_allocate_and_release_account_for_every_block():
    pool = BlockPool(num_blocks=5, block_size=8)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_held) == (0, 5)
    pool.release(first)
    assert (pool.num_free, pool.num_held) == (2, 3)
    pool.check([second])


def test_more_blocks_than_are_free_is_an_error_and_takes_nothing():
    pool = BlockPool(num_blocks=2, block_size=8)
    with pytest.raises(BooksError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_shared_block_is_free_only_after_its_last_holder():
    pool = BlockPool(num_blocks=3, block_size=8)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.check([blocks, blocks[:1]])
    pool.release(blocks)
    assert pool.num_free == 2
    pool.check([blocks[:1]])
    pool.release(blocks[:1])
    assert pool.num_free == 3


def test_releasing_a_free_block_or_sharing_it_is_an_error():
    pool = BlockPool(num_blocks=1, block_size=8)
    with pytest.raises(BooksError, match="free already"):
        pool.release([0])
    with pytest.raises(BooksError, match="cannot be shared"):
        pool.share([0])


def test_check_finds_a_block_that_no_sequence_holds():
    pool = BlockPool(num_blocks=4, block_size=8)
    blocks = pool.allocate(2)
    with pytest.raises(BooksError, match="the pool counts"):
        pool.check([blocks[:1]])


def test_freed_blocks_come_back_oldest_first():
    pool = BlockPool(num_blocks=3, block_size=8)
    pool.allocate(3)
    pool.release([1])
    pool.release([0])
    assert pool.allocate(2) == (1, 0)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (8, 1), (9, 2)])
def test_blocks_for(tokens, blocks):
    assert BlockPool(num_blocks=1, block_size=8).blocks_for(tokens) == blocks
