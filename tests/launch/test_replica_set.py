"""What Serve is asked for; that it does it is in test_replica_client.py."""

from __future__ import annotations

import pytest

from dist_vlm.config import EngineConfig
from dist_vlm.launch.replica_set import _cause_of, _options


def config(**fields: object) -> EngineConfig:
    return EngineConfig.from_fields(model="/m", device="cuda", tensor_parallel_size=2, max_num_seqs=10, **fields)


def test_a_fixed_number_of_replicas() -> None:
    options = _options(config(replicas=3, replica_health_period_s=4, replica_health_timeout_s=5))
    assert options["num_replicas"] == 3
    assert "autoscaling_config" not in options
    assert options["placement_group_bundles"] == [{"CPU": 1.0}, *[{"CPU": 1.0, "GPU": 1.0}] * 2]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert (options["health_check_period_s"], options["health_check_timeout_s"]) == (4, 5)


@pytest.mark.parametrize(("given", "target"), [({}, 10), ({"target_requests_per_replica": 4}, 4)])
def test_as_many_as_the_load_asks_for(given: dict[str, int], target: int) -> None:
    options = _options(config(replicas=2, max_replicas=5, upscale_delay_s=1, downscale_delay_s=2, **given))
    scale = options["autoscaling_config"]
    assert (scale.min_replicas, scale.initial_replicas, scale.max_replicas) == (2, 2, 5)
    assert (scale.upscale_delay_s, scale.downscale_delay_s) == (1, 2)
    assert scale.target_ongoing_requests == target
    assert options["num_replicas"] is None


def test_the_cause_of_a_failed_start_is_the_engines_own_words() -> None:
    told = """The deployment failed to start 3 times in a row. Traceback (most recent call last):
      File "/x/replica.py", line 52, in __init__
    dist_vlm.executor.base.StartError: load failed (rank 1): a.safetensors: there is no such file
    """
    assert (
        _cause_of(told)
        == "dist_vlm.executor.base.StartError: load failed (rank 1): a.safetensors: there is no such file"
    )
    assert _cause_of("no more\n  than this") == "no more than this"
