import numpy as np
import pytest

from dist_vlm.engine.messages import EngineImage, EngineRequest
from dist_vlm.engine.staging import StagingArea
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.workers.plan import ImageSpan, SamplingRow


def request(name, *keys):
    array = np.zeros((1, 3, 2, 2), np.float32)
    images = tuple(EngineImage(ImageSpan(key, 2 * i, 2), "pixel_values", array) for i, key in enumerate(keys))
    return EngineRequest(name, (1,) * (2 * len(keys) + 1), images, SamplingRow(), 4, frozenset())


@pytest.fixture
def executor():
    executor = FakeExecutor(staging_polls=1, fail_stage={"broken": "no room"})
    executor.start()
    return executor


def test_a_request_waits_for_all_its_images(executor):
    area = StagingArea(executor)
    assert not area.add(request("a", "x", "y"))
    assert area.poll() == ([], [])
    ready, failed = area.poll()
    assert ([one.request_id for one in ready], failed) == (["a"], [])
    assert area.num_waiting == 0


def test_an_image_is_staged_once_for_many_requests_and_unstaged_after_the_last(executor):
    area = StagingArea(executor)
    area.add(request("a", "x"))
    area.poll(), area.poll()
    assert area.add(request("b", "x")), "it has arrived already"
    area.end("a", ("x",), last_step_id=3)
    area.collected(9)
    assert executor.staged_images == ("x",)
    area.end("b", ("x",), last_step_id=4)
    area.collected(3)
    assert executor.staged_images == ("x",), "step 4 may still name it"
    area.collected(4)
    assert executor.staged_images == ()
    assert area.num_staged == 0


def test_an_image_wanted_again_before_it_is_unstaged_stays(executor):
    area = StagingArea(executor)
    area.add(request("a", "x"))
    area.poll(), area.poll()
    area.end("a", ("x",), last_step_id=5)
    assert area.add(request("b", "x"))
    area.collected(5)
    assert executor.staged_images == ("x",)


def test_a_staging_that_fails_fails_its_requests_alone(executor):
    area = StagingArea(executor)
    area.add(request("a", "broken", "x"))
    area.add(request("b", "x"))
    area.poll()
    ready, failed = area.poll()
    assert [one.request_id for one in ready] == ["b"]
    assert [(one.request_id, cause) for one, cause in failed] == [("a", "no room")]


def test_a_request_may_leave_while_its_images_are_on_their_way(executor):
    area = StagingArea(executor)
    area.add(request("a", "x"))
    assert area.withdraw("a")
    assert not area.withdraw("a")
    area.end("a", ("x",), last_step_id=-1)
    area.collected(-1)
    assert executor.staged_images == ()
    assert area.poll() == ([], [])
