import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_vlm.engine.intake import Intake
from dist_vlm.engine.jobs import Job
from dist_vlm.sampling import SamplingParams

PICTURE = {"prompt": "<image>", "multi_modal_data": {"image": "stands for one"}}


class Rig:
    """An intake that writes down what it draws, and by which thread and with what helpers it prepares."""

    def __init__(self, pool, inputs):
        self.pool = pool
        self.drawn = []
        self.threads = {}
        self.helpers = {}
        self.hold = threading.Event()
        self.hold.set()
        ids = itertools.count()
        self.intake = Intake(self._jobs(inputs), self._prepare, preparers=pool, new_id=lambda: str(next(ids)))

    def _jobs(self, inputs):
        for number, one in enumerate(inputs):
            self.drawn.append(number)
            yield Job(one, None, 0)

    def _prepare(self, request_id, job, *, helpers=None):
        assert self.hold.wait(10)
        self.threads[request_id] = threading.get_ident()
        self.helpers[request_id] = helpers
        if job.inputs == "bad":
            raise ValueError(f"request {request_id} is bad")
        return f"prepared {request_id}"

    def take(self, *, wait=True):
        taken = self.intake.take(wait=wait)
        return None if taken is None else (taken.request_id, taken.prepared())


@pytest.fixture
def rig():
    with ThreadPoolExecutor(2) as pool:
        yield lambda *inputs: Rig(pool, inputs)


def test_jobs_are_drawn_no_further_than_asked_and_taken_in_their_order(rig):
    made = rig(*[PICTURE] * 5)
    made.intake.draw(2)
    made.intake.draw(2)
    assert made.drawn == [0, 1]
    assert made.take() == ("0", "prepared 0")
    made.intake.draw(2)
    assert made.drawn == [0, 1, 2]
    made.intake.draw(9)
    assert [made.take() for _ in range(4)] == [(str(i), f"prepared {i}") for i in range(1, 5)]
    assert made.intake.is_over
    assert made.take() is None


def test_pictures_are_prepared_elsewhere_and_texts_here(rig):
    made = rig(PICTURE, "a text", {"prompt": "a text", "multi_modal_data": None}, PICTURE)
    made.intake.draw(4)
    for _ in range(4):
        made.take()
    here = threading.get_ident()
    assert [made.threads[key] == here for key in "0123"] == [False, True, True, False]


def test_pictures_of_a_job_that_is_alone_and_waited_for_are_prepared_here_with_all_threads_to_help(rig):
    made = rig(*[PICTURE] * 4)
    made.intake.draw(1, waits=True)
    assert made.threads == {}, "when its turn has come"
    made.take()
    made.intake.draw(2, waits=True)
    made.intake.draw(3)
    for _ in range(3):
        made.take()
    here = threading.get_ident()
    assert [made.threads[key] == here for key in "0123"] == [True, False, False, False]
    assert [made.helpers[key] for key in "0123"] == [made.pool, None, None, None]


def test_a_text_is_not_prepared_before_its_turn(rig):
    made = rig(PICTURE, "a text")
    made.hold.clear()
    made.intake.draw(2)
    assert made.intake.take(wait=False) is None, "the picture is not ready, and the text comes after it"
    assert made.threads == {}
    made.hold.set()
    assert [made.take() for _ in range(2)] == [("0", "prepared 0"), ("1", "prepared 1")]


def test_what_is_not_ready_is_not_waited_for(rig):
    made = rig(PICTURE, PICTURE)
    made.hold.clear()
    made.intake.draw(2)
    assert made.intake.take(wait=False) is None
    made.hold.set()
    end = time.monotonic() + 10
    while (taken := made.intake.take(wait=False)) is None:
        assert time.monotonic() < end
    assert taken.request_id == "0"


def test_the_other_threads_help_with_a_job_that_is_alone(rig):
    made = rig(*[PICTURE] * 4)
    made.intake.draw(1)
    made.take()
    made.intake.draw(2)
    made.take()
    made.intake.draw(2)
    made.take()
    made.take()
    assert [made.helpers[key] for key in "0123"] == [made.pool, None, None, None]


def test_an_error_is_its_jobs_alone(rig):
    made = rig("bad", PICTURE)
    made.intake.draw(2)
    with pytest.raises(ValueError, match="request 0 is bad"):
        made.take()
    assert made.take() == ("1", "prepared 1")


def test_jobs_drawn_before_an_iterable_raises_are_not_lost(rig):
    def inputs():
        yield PICTURE
        raise OSError("the file ended")

    made = Rig(rig().pool, inputs())
    with pytest.raises(OSError, match="the file ended"):
        made.intake.draw(2)
    assert made.take() == ("0", "prepared 0")


def test_a_closed_intake_prepares_no_more(rig):
    made = rig(*[PICTURE] * 8)
    made.hold.clear()
    made.intake.draw(8)
    made.intake.close()
    made.hold.set()
    made.pool.shutdown()
    assert len(made.threads) <= 2, "the two that had begun"
    assert made.intake.is_over


def test_parameters_are_those_of_the_moment_of_drawing():
    params = SamplingParams(max_tokens=3)

    def jobs():
        yield Job("first", params, 0)
        params.max_tokens = 4
        yield Job("second", params, 0)

    with ThreadPoolExecutor(1) as pool:
        intake = Intake(jobs(), lambda name, job, helpers=None: job.params.max_tokens, preparers=pool, new_id=str)
        intake.draw(2)
        assert [intake.take(wait=True).prepared() for _ in range(2)] == [3, 4]
