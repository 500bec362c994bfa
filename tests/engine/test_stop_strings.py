from hypothesis import given
from hypothesis import strategies as st

from dist_vlm.engine.stop_strings import StopStrings

TEXT = st.text("ab", max_size=24)
STRINGS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=5)


def pieces_of(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def first_complete(text, strings):
    """(end, string) by looking at every beginning of the text."""
    for end in range(1, len(text) + 1):
        met = [string for string in strings if text[:end].endswith(string)]
        if met:
            return end, max(met, key=len)
    return None


def longest_beginning(text, strings):
    starts = (string[:size] for string in strings for size in range(len(string)))
    return max((len(start) for start in starts if text.endswith(start)), default=0)


@given(TEXT, STRINGS, st.lists(st.integers(0, 24), max_size=8))
def test_the_string_complete_first_is_found_however_the_text_is_cut(text, strings, cuts):
    watch = StopStrings(strings).watch()
    read, found = 0, None
    for piece in pieces_of(text, cuts):
        match = watch.read(piece)
        if match is not None:
            found = (read + match.end, match.string)
            break
        read += len(piece)
        assert watch.num_held == longest_beginning(text[:read], strings)
    assert found == first_complete(text, strings)


@given(TEXT, TEXT, STRINGS, st.lists(st.integers(0, 24), max_size=4))
def test_a_string_complete_before_it_counts_is_passed_over(early, late, strings, cuts):
    watch = StopStrings(strings).watch()
    for piece in pieces_of(early, cuts):
        assert watch.read(piece, counts=False) is None
    # A whole string is no beginning of itself, but may end with one.
    assert watch.num_held == longest_beginning(early, strings)
    match = watch.read(late)
    ends = [end for end in range(1, len(late) + 1) if any((early + late[:end]).endswith(one) for one in strings)]
    assert (match.end if match is not None else None) == (ends[0] if ends else None)


def test_each_answer_has_a_watch_of_its_own():
    strings = StopStrings(["ab"])
    first, second = strings.watch(), strings.watch()
    assert first.read("a") is None
    assert (first.num_held, second.num_held) == (1, 0)
    assert second.read("b") is None
    assert first.read("b").string == "ab"


def test_no_character_is_read_twice():
    """A text on which looking again from every place takes a product of both lengths."""
    watch = StopStrings(["a" * 1023 + "b"] * 16).watch()
    assert watch.read("a" * 200_000) is None
    assert watch.num_held == 1023
    assert watch.read("b").end == 1
