"""What the ranks are told of the table of collectives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dist_vlm.config import ConfigError, EngineConfig, resolve
from dist_vlm.engine.rank_config import rank_config
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.models import read_spec

RULE = {"up_to_bytes": None, "path": "one_shot", "fused": False}
TABLE = {"ranks": {"2": {op: [RULE] for op in ("reduce_add_norm", "all_reduce", "all_gather")}}}


def told(model: Path, **fields: object) -> RankConfig:
    config = resolve(EngineConfig.from_fields(model=str(model), device="cpu", tensor_parallel_size=2, **fields))
    return rank_config(config, read_spec(config.model.model))


def test_without_a_table_the_ranks_take_the_package_s(tiny_facts) -> None:
    ranks = told(tiny_facts)
    assert ranks.collectives_table is None
    assert ranks.collectives == "fused"


def test_the_ranks_are_told_the_table_s_text(tiny_facts, tmp_path) -> None:
    path = tmp_path / "table.json"
    text = json.dumps({"device": "Größe"} | TABLE, indent=3, ensure_ascii=False) + "\n\n"
    path.write_text(text, encoding="utf-8")
    ranks = told(tiny_facts, collectives_table=str(path), collectives="strict")
    assert ranks.collectives_table == text
    assert ranks.collectives == "strict"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "must be a file that can be read: .*No such file"),
        (b"\xff\xfe{", "must be a file that can be read: "),
        (b"{", "must be a table for these ranks: .*: not JSON: "),
        (b"[1]", r"must be a table for these ranks: .*: ranks is missing; there is: \[1\]"),
        (
            json.dumps({"ranks": {"4": TABLE["ranks"]["2"]}}).encode(),
            "for these ranks: .*: ranks.2 is missing; there is: 4",
        ),
        (
            json.dumps({"ranks": {"2": TABLE["ranks"]["2"] | {"all_reduce": [RULE | {"path": "ring"}]}}}).encode(),
            r"for these ranks: .*ranks\.2\.all_reduce: path is 'ring', must be one of one_shot, two_shot, group",
        ),
    ],
    ids=["absent", "not-text", "not-json", "not-a-table", "other-ranks", "wrong-rule"],
)
def test_a_file_that_is_no_table_for_the_ranks_is_refused(tiny_facts, tmp_path, content, words) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        told(tiny_facts, collectives_table=str(path))
    assert error.value.field == "parallel.collectives_table"
    assert error.value.value == str(path)
    assert re.match(r"parallel\.collectives_table = ", str(error.value))


def test_a_directory_is_no_table(tiny_facts, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.collectives_table = .*: must be a file that can be read: "):
        told(tiny_facts, collectives_table=str(tmp_path))
