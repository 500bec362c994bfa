"""Rules from made-up times, the table's file, and what cannot be measured here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vlm.config import ConfigError
from dist_vlm.kernels.all_reduce.rules import OPS, Rule, Rules, rules_for
from dist_vlm.launch import cli, collective_ranks
from dist_vlm.launch.tune_collectives import best_rules, check, read_table, text, write_table


def times(op: str, *sizes: tuple[int, dict[str, float]]) -> list[dict[str, Any]]:
    """Records of so many bytes, with microseconds by way."""
    return [
        {"op": op, "rows": num_bytes // 4, "bytes": num_bytes, "microseconds": microseconds}
        for num_bytes, microseconds in sizes
    ]


ALL_TIMES = [
    *times(
        "reduce_add_norm",
        (100, {"group": 30, "one_shot": 9, "one_shot fused": 5, "two_shot": 15, "two_shot fused": 10}),
        (200, {"group": 40, "one_shot": 20, "one_shot fused": 18, "two_shot": 16, "two_shot fused": 12}),
        (400, {"group": 50, "two_shot": 60, "two_shot fused": 70}),
    ),
    *times(
        "all_reduce",
        (100, {"group": 25, "one_shot": 4, "two_shot": 8}),
        (200, {"group": 26, "one_shot": 12, "two_shot": 9}),
        (400, {"group": 27, "two_shot": 55}),
    ),
    *times("all_gather", (80, {"group": 30, "one_shot": 4}), (160, {"group": 35, "one_shot": 8})),
]


def test_each_measured_size_goes_its_fastest_way() -> None:
    assert best_rules(ALL_TIMES, "reduce_add_norm") == [
        Rule(100, "one_shot", True),
        Rule(200, "two_shot", True),
        Rule(None, "group", False),
    ]
    assert best_rules(ALL_TIMES, "all_reduce") == [Rule(100, "one_shot"), Rule(200, "two_shot"), Rule(None, "group")]
    assert best_rules(ALL_TIMES, "all_gather") == [Rule(None, "one_shot")]


def test_the_order_of_the_records_does_not_matter() -> None:
    for op in OPS:
        assert best_rules(ALL_TIMES[::-1], op) == best_rules(ALL_TIMES, op)


def test_sizes_with_the_same_way_are_one_rule() -> None:
    fast, slow = {"one_shot": 1.0, "two_shot": 2.0}, {"one_shot": 4.0, "two_shot": 3.0}
    found = best_rules(times("all_reduce", (10, fast), (20, fast), (40, slow), (80, slow), (160, slow)), "all_reduce")
    assert found == [Rule(20, "one_shot"), Rule(None, "two_shot")]


def test_a_way_and_its_fused_kind_are_two() -> None:
    found = best_rules(
        times(
            "reduce_add_norm", (10, {"one_shot": 5, "one_shot fused": 4}), (20, {"one_shot": 5, "one_shot fused": 6})
        ),
        "reduce_add_norm",
    )
    assert found == [Rule(10, "one_shot", True), Rule(None, "one_shot", False)]


@pytest.mark.parametrize(
    ("second", "changes"), [(96.9, True), (97.1, False), (99.0, False), (100.0, False), (103.0, False)]
)
def test_a_change_must_be_worth_three_percent(second, changes) -> None:
    """Against going on as before, not against the next best."""
    found = best_rules(
        times(
            "all_reduce",
            (10, {"one_shot": 10.0, "two_shot": 20.0, "group": 30.0}),
            (20, {"one_shot": 100.0, "two_shot": second, "group": 97.5}),
        ),
        "all_reduce",
    )
    # A group at 97.5 is no reason either.
    assert found == ([Rule(10, "one_shot"), Rule(None, "two_shot")] if changes else [Rule(None, "one_shot")])


def test_going_on_as_before_is_going_on_fused() -> None:
    found = best_rules(
        times(
            "reduce_add_norm",
            (10, {"one_shot": 9.0, "one_shot fused": 5.0, "group": 30.0}),
            (20, {"one_shot": 100.0, "one_shot fused": 50.0, "group": 49.0}),
        ),
        "reduce_add_norm",
    )
    assert found == [Rule(None, "one_shot", True)]


def test_the_first_size_needs_no_reason_and_later_ones_compare_with_the_way_that_was_taken() -> None:
    found = best_rules(
        times(
            "all_reduce",
            (10, {"one_shot": 100.0, "two_shot": 99.9}),
            (20, {"one_shot": 98.0, "two_shot": 100.0}),
            (40, {"one_shot": 96.0, "two_shot": 100.0}),
        ),
        "all_reduce",
    )
    assert found == [Rule(20, "two_shot"), Rule(None, "one_shot")]


def test_a_way_that_was_not_measured_at_a_size_is_not_gone_on_with() -> None:
    found = best_rules(times("all_reduce", (10, {"one_shot": 1, "group": 2}), (20, {"group": 9})), "all_reduce")
    assert found == [Rule(10, "one_shot"), Rule(None, "group")]


def found_on(device: str, records: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"device": device, "link_bytes_per_s": 1e11, "times": ALL_TIMES if records is None else records}


def test_a_written_table_is_one_that_a_launch_takes(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_table(path, found_on("Some GPU"), 4)
    written = path.read_text(encoding="utf-8")
    assert json.loads(written)["device"] == "Some GPU"
    rules: Rules = rules_for("Some GPU", 4, table=written)
    for record in ALL_TIMES:
        chosen = rules.choose(record["op"], record["bytes"])
        name = chosen.path + " fused" * chosen.fused
        assert record["microseconds"][name] == min(record["microseconds"].values())


def test_other_numbers_of_ranks_are_kept_and_the_same_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    slow = [record | {"microseconds": {"group": 1.0}} for record in ALL_TIMES]
    write_table(path, found_on("Some GPU", slow), 8)
    of_eight = json.loads(path.read_text(encoding="utf-8"))["ranks"]["8"]
    write_table(path, found_on("Some GPU", slow), 2)
    write_table(path, found_on("Some GPU"), 2)
    ranks = json.loads(path.read_text(encoding="utf-8"))["ranks"]
    assert list(ranks) == ["2", "8"]
    assert ranks["8"] == of_eight
    written = path.read_text(encoding="utf-8")
    assert rules_for("Some GPU", 2, table=written).choose("all_reduce", 100).path == "one_shot"
    assert rules_for("Some GPU", 8, table=written).choose("all_reduce", 100).path == "group"


def test_the_text_has_a_line_a_size_with_a_star_at_the_fastest() -> None:
    lines = text(ALL_TIMES).splitlines()
    assert len(lines) == len(ALL_TIMES)
    assert lines[4].split() == [
        "all_reduce", "50", "rows", "200", "bytes", "group", "26.0", "one_shot", "12.0", "two_shot", "9.0*",
    ]  # fmt: skip
    assert [line.count("*") for line in lines] == [1] * len(lines)
    assert "one_shot fused 5.0*" in lines[0]


def arguments(**changes: Any) -> argparse.Namespace:
    values = {"tensor_parallel_size": 2, "hidden_size": 4096, "vocab_size": 32064, "dtype": "bfloat16", "out": "t.json"}
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize(
    ("gpus", "changes", "message"),
    [
        (0, {}, "tensor_parallel_size = 2: must be from 2 to 8, and at most the GPUs of this machine, which are 0"),
        (4, {"tensor_parallel_size": 5}, "tensor_parallel_size = 5: must be from 2 to 8, and at most .* are 4"),
        (4, {"tensor_parallel_size": 1}, "tensor_parallel_size = 1: must be from 2 to 8"),
        (16, {"tensor_parallel_size": 9}, "tensor_parallel_size = 9: must be from 2 to 8"),
        (2, {"hidden_size": 0}, "hidden_size = 0: must be at least 1"),
        (2, {"vocab_size": -1}, "vocab_size = -1: must be at least 1"),
        (2, {"out": "/no/such/directory/t.json"}, "out = '/no/such/directory/t.json': must be a file in an existing"),
        (2, {"out": "/"}, "out = '/': must be a file in an existing"),
    ],
)
def test_what_cannot_be_measured_is_named(monkeypatch, tmp_path: Path, gpus, changes, message) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check(arguments(**changes))


def test_what_can_be_measured_is_let_through(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.chdir(tmp_path)
    check(arguments(tensor_parallel_size=8, hidden_size=1, vocab_size=1))


def test_the_command_refuses_without_gpus_in_a_line_and_status_2(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = tmp_path / "t.json"
    assert cli.main(["tune-collectives", "-tp", "2", "--out", str(out)]) == 2
    said, error = capsys.readouterr()
    assert said == ""
    assert error == (
        "dist-vlm: error: tensor_parallel_size = 2: must be from 2 to 8, and at most the GPUs of this machine, "
        "which are 0\n"
    )
    assert not out.exists()


def test_the_command_measures_and_writes_what_it_says(monkeypatch, tmp_path: Path, capsys) -> None:
    asked: list[dict[str, Any]] = []

    def measure(**named: Any) -> dict[str, Any]:
        asked.append(named)
        return found_on("Some GPU")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(collective_ranks, "measure", measure)
    out = tmp_path / "t.json"
    words = ["tune-collectives", "-tp", "3", "--out", str(out), "--vocab-size", "100", "--hidden-size", "64"]
    assert cli.main([*words, "--dtype", "float16"]) == 0
    (named,) = asked
    sizes = named.pop("row_counts")
    assert sizes[0] == 1
    assert sizes[-1] == 8192
    assert named == {"world_size": 3, "hidden_size": 64, "columns": 34, "dtype": "float16"}
    assert capsys.readouterr().out == text(ALL_TIMES) + "\n"
    assert rules_for("", 3, table=out.read_text(encoding="utf-8")).edges("all_reduce") == [100, 200]


@pytest.mark.parametrize("held", ["not JSON", "[]", '{"device": "Other", "ranks": 2}'])
def test_a_file_that_is_no_table_is_refused_before_anything_is_measured(held, tmp_path) -> None:
    path = tmp_path / "table.json"
    path.write_text(held, encoding="utf-8")
    with pytest.raises(ConfigError, match="out.*must be a table"):
        read_table(path)
