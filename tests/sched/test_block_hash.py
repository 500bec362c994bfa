"""Digests against what they stand for: two sequences share a digest exactly where all positions up to it are equal."""

from hypothesis import given
from hypothesis import strategies as st

from dist_vlm.sched.block_hash import BlockHasher
from dist_vlm.workers.plan import ImageSpan

SIZE = 4
HASHER = BlockHasher(SIZE, key=b"k" * 16)


def digests(tokens, images=(), *, hasher=HASHER, salt=""):
    found: list[bytes] = []
    hasher.extend(found, tokens, images, root=hasher.root(salt=salt), num_blocks=len(tokens) // SIZE)
    return found


SEQUENCES = st.tuples(
    st.lists(st.integers(0, 2), min_size=8, max_size=16),
    st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 6), st.integers(1, 6)), max_size=1),
)


def contents(tokens, images):
    """Position by position, by the rule in the module's text."""
    found = list(tokens)
    for span in images:
        for position in range(span.start, min(span.end, len(found))):
            found[position] = (span.image, position - span.start)
    return found


@given(first=SEQUENCES, second=SEQUENCES)
def test_equal_exactly_where_everything_up_to_it_is_equal(first, second):
    sequences = [(tokens, [ImageSpan(*image) for image in images]) for tokens, images in (first, second)]
    a, b = (digests(tokens, images) for tokens, images in sequences)
    what_a, what_b = (contents(tokens, images) for tokens, images in sequences)
    for index in range(min(len(a), len(b))):
        end = (index + 1) * SIZE
        assert (a[index] == b[index]) == (what_a[:end] == what_b[:end])


def test_the_same_text_with_another_picture_shares_only_what_lies_before_it():
    tokens = [1] * 16
    x, y = (digests(tokens, [ImageSpan(image, 6, 4)]) for image in "xy")
    assert x[0] == y[0]
    assert not set(x[1:]) & set(y[1:])


def test_another_row_of_the_same_picture_is_another_content():
    assert digests([0] * 4, [ImageSpan("x", 0, 8)]) != digests([0] * 4, [ImageSpan("x", -1, 8)])


def test_salts_adapters_and_keys_share_nothing():
    plain = digests([1] * 4)
    assert digests([1] * 4, salt="tenant") != plain
    assert HASHER.root(salt="a", adapter="b") != HASHER.root(salt="b", adapter="a")
    assert HASHER.root(salt="ab") != HASHER.root(salt="b", adapter="a")
    assert digests([1] * 4, hasher=BlockHasher(SIZE)) != digests([1] * 4, hasher=BlockHasher(SIZE))


def test_digests_grow_with_the_sequence():
    found: list[bytes] = []
    root = HASHER.root(salt="")
    HASHER.extend(found, [1, 2, 3, 4, 5], (), root=root, num_blocks=1)
    HASHER.extend(found, [1, 2, 3, 4, 5, 6, 7, 8], (), root=root, num_blocks=2)
    assert found == digests([1, 2, 3, 4, 5, 6, 7, 8])
