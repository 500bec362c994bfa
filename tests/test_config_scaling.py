"""The section `scaling` and what it has to do with `parallel.replicas`."""

from __future__ import annotations

import pytest

from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.llm import LLM
from dist_vlm.sampling import SamplingParams


@pytest.mark.parametrize(
    ("fields", "most"),
    [({}, 1), ({"replicas": 3}, 3), ({"max_replicas": 4}, 4), ({"replicas": 2, "max_replicas": 2}, 2)],
)
def test_how_many_replicas_there_may_be(fields: dict[str, int], most: int) -> None:
    assert EngineConfig.from_fields(model="m", **fields).most_replicas == most


def test_fewer_at_most_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scaling\.max_replicas = 2: must be at least parallel\.replicas, which is"):
        EngineConfig.from_fields(model="m", replicas=3, max_replicas=2)


def test_a_driver_of_one_group_leaves_it_to_the_server_and_refuses_replicas(tiny_facts: object) -> None:
    fields = {"model": str(tiny_facts), "device": "cpu", "executor": "fake", "max_model_len": 128, "max_replicas": 4}
    with LLM(**fields) as llm:
        assert llm.generate("hello", SamplingParams(max_tokens=1), use_tqdm=False)[0].error is None
    with pytest.raises(ValueError, match="replicas = 2: an LLM drives one tensor-parallel group"):
        LLM(**fields, replicas=2)
