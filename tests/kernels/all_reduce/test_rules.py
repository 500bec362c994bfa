"""Which way is chosen, and what a table must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.kernels.all_reduce import rules as rules_module
from dist_vlm.kernels.all_reduce.rules import OPS, PATHS, Rule, Rules, RulesError, parse_table, rules_for, table_entry

MIB = 1 << 20
TABLES = sorted((Path(rules_module.__file__).parent / "tables").glob("*.json"))


@pytest.fixture(autouse=True)
def can_run() -> None:
    """Needs no device."""


def entry(up_to_bytes: object, path: object, fused: object = False) -> dict[str, object]:
    return {"up_to_bytes": up_to_bytes, "path": path, "fused": fused}


def table(ranks: int = 2, **changes: Any) -> dict[str, Any]:
    ops = {
        "reduce_add_norm": [entry(100, "one_shot", True), entry(1000, "two_shot"), entry(None, "group")],
        "all_reduce": [entry(100, "one_shot"), entry(1000, "two_shot"), entry(None, "group")],
        "all_gather": [entry(50, "group"), entry(None, "one_shot")],
    }
    return {"device": "Some GPU", "ranks": {str(ranks): ops | changes}}


def parsed(**changes: Any) -> Rules:
    return parse_table(json.dumps(table(**changes)), 2, "t.json")


@pytest.mark.parametrize(
    ("op", "num_bytes", "path", "fused"),
    [
        ("reduce_add_norm", 1, "one_shot", True),
        ("reduce_add_norm", 100, "one_shot", True),
        ("reduce_add_norm", 101, "two_shot", False),
        ("reduce_add_norm", 1000, "two_shot", False),
        ("reduce_add_norm", 1001, "group", False),
        ("all_reduce", 0, "one_shot", False),
        ("all_reduce", 100, "one_shot", False),
        ("all_reduce", 101, "two_shot", False),
        ("all_reduce", 1 << 40, "group", False),
        ("all_gather", 50, "group", False),
        ("all_gather", 51, "one_shot", False),
    ],
)
def test_the_first_rule_that_reaches_so_far_is_chosen(op, num_bytes, path, fused) -> None:
    rule = parsed().choose(op, num_bytes)
    assert (rule.path, rule.fused) == (path, fused)


def test_edges_are_the_sizes_at_which_the_way_changes() -> None:
    assert {op: parsed().edges(op) for op in OPS} == {
        "reduce_add_norm": [100, 1000],
        "all_reduce": [100, 1000],
        "all_gather": [50],
    }


def test_the_log_has_every_rule() -> None:
    assert str(parsed()) == (
        "reduce_add_norm: to 100 bytes one_shot fused, to 1000 bytes two_shot, more group; "
        "all_reduce: to 100 bytes one_shot, to 1000 bytes two_shot, more group; "
        "all_gather: to 50 bytes group, more one_shot"
    )


def test_without_the_group_every_size_has_another_way() -> None:
    rules = parsed().without_group()
    assert rules.source == "t.json"
    assert rules.by_op == {
        "reduce_add_norm": (Rule(100, "one_shot", True), Rule(1000, "two_shot"), Rule(None, "two_shot", True)),
        "all_reduce": (Rule(100, "one_shot"), Rule(1000, "two_shot"), Rule(None, "two_shot")),
        "all_gather": (Rule(None, "one_shot"),),
    }
    (alone,) = parsed(all_reduce=[entry(None, "group")]).without_group().by_op["all_reduce"]
    assert alone == Rule(None, "two_shot")


def test_an_entry_of_a_table_says_what_its_rule_says() -> None:
    rules = (Rule(7, "one_shot", True), Rule(None, "group"))
    found = parsed(reduce_add_norm=table_entry(rules)).by_op["reduce_add_norm"]
    assert found == rules


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"all_reduce": "one_shot"}, ["t.json: ranks.2.all_reduce is 'one_shot'", "must be a list of rules"]),
        ({"all_reduce": []}, ["ranks.2.all_reduce is []", "must be a list of rules"]),
        ({"all_reduce": ["two"]}, ["ranks.2.all_reduce: 'two'", "must have up_to_bytes, path and fused"]),
        (
            {"all_reduce": [entry(None, "group") | {"upto": 3}]},
            ["ranks.2.all_reduce: ", "'upto': 3", "must have up_to_bytes, path and fused alone"],
        ),
        ({"all_reduce": [entry("9", "group")]}, ["up_to_bytes is '9'", "must be a positive number or null"]),
        ({"all_reduce": [entry(0, "group")]}, ["up_to_bytes is 0", "must be a positive number or null"]),
        ({"all_reduce": [entry(-5, "group")]}, ["up_to_bytes is -5", "must be a positive number or null"]),
        ({"all_reduce": [entry(True, "group")]}, ["up_to_bytes is True", "must be a positive number or null"]),
        ({"all_reduce": [entry(1.5, "group")]}, ["up_to_bytes is 1.5", "must be a positive number or null"]),
        ({"all_reduce": [entry(9, "group")]}, ["ranks.2.all_reduce: the last rule has up_to_bytes 9", "must be null"]),
        (
            {"all_reduce": [entry(9, "one_shot"), entry(9, "two_shot"), entry(None, "group")]},
            ["ranks.2.all_reduce: up_to_bytes are [9, 9, None]", "must grow"],
        ),
        (
            {"all_reduce": [entry(9, "one_shot"), entry(8, "two_shot"), entry(None, "group")]},
            ["up_to_bytes are [9, 8, None]", "must grow"],
        ),
        (
            {"all_reduce": [entry(None, "one_shot"), entry(None, "group")]},
            ["up_to_bytes are [None, None]", "must grow"],
        ),
        (
            {"all_reduce": [entry(None, "ring")]},
            ["ranks.2.all_reduce: path is 'ring'", "must be one of one_shot, two_shot, group"],
        ),
        ({"all_reduce": [{"up_to_bytes": None}]}, ["path is None", "must be one of one_shot, two_shot, group"]),
        (
            {"all_gather": [entry(None, "two_shot")]},
            ["ranks.2.all_gather: path is 'two_shot'", "must be one of one_shot, group"],
        ),
        ({"all_reduce": [entry(None, "one_shot", True)]}, ["ranks.2.all_reduce: fused is True", "must be false"]),
        ({"all_gather": [entry(None, "one_shot", True)]}, ["ranks.2.all_gather: fused is True", "must be false"]),
        ({"reduce_add_norm": [entry(None, "group", True)]}, ["reduce_add_norm: fused is True", "must be false"]),
        ({"reduce_add_norm": [entry(None, "one_shot", "yes")]}, ["reduce_add_norm: fused is 'yes'"]),
        ({"reduce_add_norm": [entry(None, "one_shot", 1)]}, ["reduce_add_norm: fused is 1"]),
    ],
)
def test_what_is_not_a_rule_is_named(changes, words) -> None:
    with pytest.raises(RulesError) as error:
        parsed(**changes)
    assert [word for word in ["t.json: ", *words] if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "t.json: not JSON: "),
        ("[]", "t.json: ranks is missing; there is: []"),
        ("{}", "t.json: ranks is missing"),
        ('{"device": "x"}', "t.json: ranks is missing; there is: device"),
        ('{"ranks": 3}', "t.json: ranks.2 is missing; there is: 3"),
        (json.dumps(table(4)), "t.json: ranks.2 is missing; there is: 4"),
        ('{"ranks": {"2": {"all_reduce": []}}}', "t.json: ranks.2.reduce_add_norm is missing; there is: all_reduce"),
    ],
)
def test_what_is_not_a_table_is_named(text, words) -> None:
    with pytest.raises(RulesError, match="t.json") as error:
        parse_table(text, 2, "t.json")
    assert words in str(error.value)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_the_estimate_takes_few_bytes_in_one_shot_and_many_by_the_group(ranks) -> None:
    rules = rules_for("A GPU that nobody has", ranks)
    assert rules.source == f"an estimate: {ranks} ranks were not measured on this device"
    one_shot = MIB // (ranks - 1)
    for op, fused in (("reduce_add_norm", True), ("all_reduce", False)):
        ways = [rules.choose(op, size) for size in (1, one_shot, one_shot + 1, 8 * MIB, 8 * MIB + 1)]
        assert [way.path for way in ways] == ["one_shot", "one_shot", "two_shot", "two_shot", "group"]
        assert [way.fused for way in ways] == [fused] * 4 + [False]
    assert [rules.choose("all_gather", size).path for size in (MIB, MIB + 1)] == ["one_shot", "group"]
    # It is one that a table could have.
    entries = {op: table_entry(rules.by_op[op]) for op in OPS}
    again = parse_table(json.dumps({"ranks": {str(ranks): entries}}), ranks, "t.json")
    assert again.by_op == rules.by_op


def test_there_is_a_table() -> None:
    assert TABLES


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_each_table_of_the_package_serves_all_ranks_it_has(path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem == found["device"].lower().replace(" ", "-")
    assert found["ranks"]
    for ranks, ops in found["ranks"].items():
        assert 2 <= int(ranks) <= 8
        rules = rules_for(found["device"], int(ranks))
        assert rules.source == path.name
        assert set(rules.by_op) == set(OPS)
        for op in OPS:
            assert [table_entry([rule])[0] for rule in rules.by_op[op]] == ops[op]
            assert {rule.path for rule in rules.by_op[op]} <= set(PATHS)


def test_a_count_of_ranks_that_its_table_lacks_is_estimated(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rules_module, "_TABLES", tmp_path)
    (tmp_path / "some-gpu.json").write_text(json.dumps(table(2)), encoding="utf-8")
    assert rules_for("Some GPU", 2).source == "some-gpu.json"
    assert rules_for("Some GPU", 4).source.startswith("an estimate: 4 ranks")
    assert rules_for("Some GPU 2", 2).source.startswith("an estimate: 2 ranks")


def test_a_configured_table_stands_before_the_package_s_and_must_have_the_ranks() -> None:
    text = json.dumps(table(2))
    rules = rules_for("NVIDIA H200", 2, table=text)
    assert rules.source == "the configured table"
    assert rules.edges("all_reduce") == [100, 1000]
    with pytest.raises(RulesError, match="the configured table: ranks.4 is missing; there is: 2"):
        rules_for("NVIDIA H200", 4, table=text)
