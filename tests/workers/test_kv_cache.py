import torch

from dist_vlm.workers.kv_cache import KVCache, block_bytes

SHAPE = {"num_layers": 3, "block_size": 8, "num_kv_heads": 2, "head_dim": 4, "dtype": torch.bfloat16}


def test_its_bytes_are_the_blocks_bytes():
    cache = KVCache.allocate(num_blocks=5, device=torch.device("cpu"), **SHAPE)
    assert block_bytes(**SHAPE) == 2 * 3 * 8 * 2 * 4 * 2
    assert cache.num_bytes == 5 * block_bytes(**SHAPE)
    assert cache.keys[2].shape == (5, 8, 2, 4)


def test_blocks_are_copied_in_every_layer_in_order():
    cache = KVCache.allocate(num_blocks=4, device=torch.device("cpu"), **SHAPE)
    for part in cache.keys + cache.values:
        part.copy_(torch.randn(part.shape))
    before = [part.clone() for part in cache.keys + cache.values]
    cache.copy_blocks(((0, 1), (1, 3)))
    for part, old in zip(cache.keys + cache.values, before, strict=True):
        assert torch.equal(part[1], old[0])
        assert torch.equal(part[3], old[0])
        assert torch.equal(part[2], old[2])
