from __future__ import annotations

import pytest
from timeline import Event, short, timeline


def step(start: float, *, late: float = 0.0) -> list[Event]:
    """20 us from its beginning to that of the next: "embed" 2, 1 idle, "mm" 5, a copy of 4 beside its last 3, then
    3 idle, "choose" 2, and "Memcpy DtoH" 1 after 1 idle; "late" makes all but the first later."""
    at = start + late
    return [
        ("void embed<float>(int)", start, start + 2),
        ("mm", at + 3, at + 8),
        ("Memcpy HtoD", at + 5, at + 9),
        ("choose", at + 12, at + 14),
        ("Memcpy DtoH", at + 15, at + 16),
    ]


def test_each_microsecond_of_a_step_is_in_its_place() -> None:
    events = [*step(0), *step(20), *step(40)]
    table = timeline(reversed(events), first="embed", last="choose")
    assert (table.steps, table.wall_us, table.median_us, table.longest_us) == (2, 20, 20, 20)
    # 2 + (3 to 9) + 2 + 1
    assert (table.busy_us, table.idle_us) == (11, 9)
    assert table.idle_share == pytest.approx(0.45)
    # 1 before the copy, and 4 before the next step.
    assert table.between_us == 5
    found = {row.name: (row.count, row.total_us, row.share, row.idle_before_us) for row in table.rows}
    assert found == {
        "mm": (1, 5, 0.25, 1),
        "Memcpy HtoD": (1, 4, 0.2, 0),
        "embed": (1, 2, 0.1, 4),
        "choose": (1, 2, 0.1, 3),
        "Memcpy DtoH": (1, 1, 0.05, 1),
    }
    assert [row.total_us for row in table.rows] == [5, 4, 2, 2, 1]
    assert table.busy_us + sum(row.idle_before_us for row in table.rows) == table.wall_us


def test_steps_of_different_lengths_are_means_and_the_longest_is_told() -> None:
    events = [*step(0), *step(20, late=4), *step(50), *step(70)]
    table = timeline(events, first="embed", last="choose")
    assert (table.wall_us, table.median_us, table.longest_us) == (pytest.approx(70 / 3), 20, 30)
    # One step idles for 4 more within it, and for 6 more at its end.
    assert table.idle_us == pytest.approx(9 + 10 / 3)
    assert table.between_us == pytest.approx(5 + 6 / 3)


def test_the_first_steps_are_left_out() -> None:
    events = [*step(0, late=3), *step(20), *step(40)]
    table = timeline(events, first="embed", last="choose", skip=1)
    assert (table.steps, table.idle_us, table.between_us) == (1, 9, 5)


def test_what_runs_across_the_ends_counts_as_far_as_it_is_between_them() -> None:
    events = [("other", -5.0, 1.5), *step(0), *step(20), ("other", 19.0, 30.0)]
    table = timeline(events, first="embed", last="choose")
    found = {row.name: row for row in table.rows}
    # 1.5 of the one and 1 of the other; only the second began here.
    assert (found["other"].total_us, found["other"].count) == (2.5, 1)
    assert (table.busy_us, table.between_us) == (12, 4)


def test_no_whole_step_is_an_error_that_tells_what_there_was() -> None:
    with pytest.raises(ValueError, match="no steps from 'embed' to 'choose' among 1 'embed', 1 'mm'"):
        timeline(step(0), first="embed", last="choose")
    with pytest.raises(ValueError, match="no steps from 'embed' to 'gone'"):
        timeline([*step(0), *step(20)], first="embed", last="gone")
    with pytest.raises(ValueError, match="no events at all"):
        timeline([], first="embed", last="choose")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("_greedy_kernel", "_greedy_kernel"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_splitK_TNT", "nvjet_hsh_64x8_64x16_4x1_v_bz_splitK_TNT"),
        ("void at::native::reduce_kernel<512, 1, at::native::Op<float>>(at::Tensor)", "reduce_kernel"),
        (
            "void at::native::(anonymous namespace)::fill<int, std::array<char*, 1ul> >(int, std::array<char*, 1ul>)",
            "fill",
        ),
        ("void cutlass::Kernel2<cutlass_80_tensorop>(Params)", "Kernel2"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        ("aten::index_put_", "aten::index_put_"),
        (
            "void index_elementwise_kernel<128, 4, gpu::{lambda(int)#1}>(long, gpu::{lambda(int)#1})",
            "index_elementwise_kernel",
        ),
    ],
)
def test_short_names(name: str, found: str) -> None:
    assert short(name) == found
