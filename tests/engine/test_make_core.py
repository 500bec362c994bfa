"""What a configuration says reaches the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dist_vlm.config import EngineConfig
from dist_vlm.engine.make_core import make_core
from dist_vlm.engine.messages import EngineImage, EngineRequest
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.workers.plan import ImageSpan, SamplingRow, StepPlan, StepResult


class Watched(FakeExecutor):
    """Notes how many plans were in flight at most."""

    num_in_flight = most_in_flight = 0

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)

    def collect(self) -> StepResult:
        self.num_in_flight -= 1
        return super().collect()


def request(name: str, *, length: int = 40, image: str | None = None) -> EngineRequest:
    array = np.zeros((1, 3, 2, 2), np.float32)
    images = () if image is None else (EngineImage(ImageSpan(image, 1, 16), "pixel_values", array),)
    return EngineRequest(name, tuple(range(length)), images, SamplingRow(), 4, frozenset())


@pytest.fixture
def run(engine_config: EngineConfig) -> Callable[..., tuple[Any, Watched]]:
    def run(section: str, **changes: Any) -> tuple[Any, Watched]:
        """Two requests with the same prompt, and a second one of each with an image, one after the other."""
        changed = dataclasses.replace(getattr(engine_config, section), **changes)
        executor = Watched(num_blocks=64, block_size=8)
        core = make_core(dataclasses.replace(engine_config, **{section: changed}), executor)
        core.start()
        for one in (request("a"), request("b"), request("c", image="x"), request("d", image="x")):
            core.add(one)
            while core.has_work:
                core.step()
        return core, executor

    return run


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_as_many_steps_are_in_flight_as_configured(run: Callable[..., tuple[Any, Watched]], depth: int) -> None:
    assert run("scheduler", max_steps_in_flight=depth)[1].most_in_flight == depth


@pytest.mark.parametrize("enabled", [True, False])
def test_prefixes_are_shared_where_configured(run: Callable[..., tuple[Any, Watched]], enabled: bool) -> None:
    core, _ = run("cache", enable_prefix_caching=enabled)
    assert (core.stats.num_hit_tokens > 0) is enabled


@pytest.mark.parametrize(("rows", "num_held"), [(None, 1), (0, 0)])
def test_features_are_kept_where_configured(
    run: Callable[..., tuple[Any, Watched]], rows: int | None, num_held: int
) -> None:
    core, executor = run("vision", feature_cache_tokens=rows)
    core.add(request("last"))
    while core.has_work:
        core.step()
    assert len(executor.held_features) == num_held
