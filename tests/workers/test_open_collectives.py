"""What a launch opens between real ranks, what its certificate finds, and what is used then."""

from __future__ import annotations

import json

import pytest

from tests.workers.collective_ranks import run

HERE = [
    pytest.param({"device": "cpu", "dtype": "bfloat16"}, "shared memory", "gloo", id="cpu"),
    pytest.param(
        {"device": "cuda", "share_gpu": True, "dtype": "bfloat16", "rounds": 200},
        "peer memory",
        "gloo",
        id="shared-gpu",
        marks=pytest.mark.gpu,
    ),
    pytest.param(
        {"device": "cuda", "dtype": "bfloat16", "rounds": 2000},
        "peer memory",
        "nccl",
        id="gpus",
        marks=pytest.mark.multi_gpu,
    ),
]


@pytest.mark.parametrize(("job", "name", "group"), HERE)
def test_the_certificate_passes_and_all_calls_add_up(job, name, group) -> None:
    for found in run(2, **job):
        assert found["opened"] == found["name"] == name
        assert found["fault"] is None
        assert found["wrong"] == 0


@pytest.mark.parametrize(("job", "name", "group"), HERE)
def test_a_part_added_twice_fails_it_and_the_group_takes_over(job, name, group) -> None:
    found = run(2, faults={1: "twice"}, **job)
    for answer in found:
        assert answer["opened"] == name
        assert answer["name"] == group
        assert "numbers" in answer["fault"]
    lines = [line for line in found[0]["log"].splitlines() if "the collectives are those of" in line]
    assert len(lines) == 1
    assert f"those of {group}: rank 0: reduce_add_norm of 1 rows" in lines[0]


def test_strict_refuses_to_start_instead() -> None:
    for found in run(2, device="cpu", collectives="strict", faults={0: "twice"}):
        assert "parallel.collectives is 'strict', and they cannot be used: rank 0: " in found["error"]


@pytest.mark.parametrize(("job", "name", "group"), HERE)
def test_a_rank_that_is_killed_is_named_by_the_others(job, name, group) -> None:
    found = run(3 if group == "gloo" else 2, faults={1: "killed"}, **(job | {"timeout_s": 8.0}))
    assert found.pop(1) is None
    for answer in found:
        assert "rank 1" in answer["error"]


def test_group_opens_none_and_other_kernels_say_so() -> None:
    (plain, _) = run(2, device="cpu", collectives="group")
    assert plain["opened"] == "gloo"
    assert "the collectives are those of" not in plain["log"]
    (torch_kernels, _) = run(2, device="cpu", kernels="torch")
    assert torch_kernels["opened"] == "gloo"
    assert "those of gloo: rank 0: kernels is 'torch', must be 'cpp'" in torch_kernels["log"]


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_way_between_processes_that_share_a_gpu(world_size) -> None:
    """A table with narrow ranges takes all ways in turn."""
    ways = {
        "reduce_add_norm": [
            (2000, "one_shot", True),
            (9000, "two_shot", True),
            (30000, "one_shot", False),
            (None, "two_shot", False),
        ],
        "all_reduce": [(2000, "one_shot", False), (None, "two_shot", False)],
        "all_gather": [(None, "one_shot", False)],
    }
    entries = {
        op: [dict(zip(("up_to_bytes", "path", "fused"), way, strict=True)) for way in rules]
        for op, rules in ways.items()
    }
    table = json.dumps({"ranks": {str(world_size): entries}})
    for found in run(
        world_size, device="cuda", share_gpu=True, table=table, rounds=300, dtype="float16", timeout_s=60.0
    ):
        assert found["name"] == "peer memory"
        assert found["fault"] is None
        assert found["wrong"] == 0
