import pytest
import torch

from dist_vlm.kernels.philox import philox4x32, uniform_noise

# Known answers published with the generator (Random123, kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(words(counter), words(key))) == expected


def plain_philox(counter, key):
    """The published round in Python integers, independent of the tensor form."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_each_column_is_its_word_of_its_counter():
    seed, sample_index, position, width = 0x1234_5678_9ABC_DEF0, 3, 4097, 11
    row = uniform_noise(torch.tensor([seed]), torch.tensor([sample_index]), torch.tensor([position]), width)[0]
    for column in range(width):
        block = plain_philox((column // 4, position, sample_index, 0), (seed & 0xFFFFFFFF, seed >> 32))
        assert row[column].item() == ((block[column % 4] >> 9) + 0.5) / 2**23


def test_a_row_does_not_depend_on_its_batch():
    seeds, indices, positions = torch.tensor([1, 2, 1]), torch.tensor([0, 0, 1]), torch.tensor([5, 5, 5])
    together = uniform_noise(seeds, indices, positions, 101)
    for i in range(3):
        alone = uniform_noise(seeds[i : i + 1], indices[i : i + 1], positions[i : i + 1], 101)
        assert torch.equal(together[i : i + 1], alone)
    assert not torch.equal(together[0], together[2])


def test_noise_is_uniform_and_strictly_inside_the_unit_interval():
    noise = uniform_noise(torch.arange(50), torch.zeros(50, dtype=torch.int64), torch.arange(50), 20_000)
    assert 0 < noise.min() and noise.max() < 1
    counts = torch.histc(noise, bins=64, min=0, max=1)
    expected = noise.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 63 degrees of freedom: above 118 once in 10^5 (the draw is fixed, so this passes always or never).
    assert chi_square < 118
