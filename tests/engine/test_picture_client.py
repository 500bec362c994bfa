"""The pool's end of one process: how it starts, what is believed of its answers, and how it is lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dist_vlm.engine import picture_messages as messages
from dist_vlm.engine.picture_client import PictureClient, ProcessLost
from dist_vlm.media import PictureError

from .scripted_pictures import SHAPE, scripted_program

CONFIGURE = messages.Configure("{}", 1, 1)
WAIT_S = 30.0


@pytest.fixture
def make() -> Iterator[Callable[..., PictureClient]]:
    made: list[PictureClient] = []

    def build(*program: str) -> PictureClient:
        made.append(PictureClient(CONFIGURE, shape=SHAPE, program=program))
        return made[-1]

    yield build
    for client in made:
        client.close()
        with pytest.raises(ProcessLookupError):
            os.kill(client.pid, 0)


def test_an_answer_is_an_array_of_the_right_shape_that_may_be_written(make: Callable[..., PictureClient]) -> None:
    client = make(*scripted_program())
    client.await_ready(WAIT_S)
    for source in ("value 3.5", b"value 3.5"):
        pooled = client.prepare(source, name="it", timeout_s=WAIT_S)
        assert (pooled.decode_s, pooled.preprocess_s, pooled.width, pooled.height) == (0.25, 0.5, 80, 60)
        assert (pooled.image.key, pooled.image.kind) == ("0" * 32, "pixel_values")
        np.testing.assert_array_equal(pooled.image.array, np.full(SHAPE, 3.5, np.float32), strict=True)
        pooled.image.array[:] = 1
    with pytest.raises(PictureError, match="^it: refused$"):
        client.prepare("refuse", name="it", timeout_s=WAIT_S)
    assert client.prepare("", name="it", timeout_s=WAIT_S).image.array.max() == 0


@pytest.mark.parametrize(
    "source", ["babble", "shape 57", "kind of pixels", "key zz", "key " + "A" * 32, "key " + "0" * 33]
)
def test_an_answer_that_cannot_be_right_loses_the_process(source: str, make: Callable[..., PictureClient]) -> None:
    client = make(*scripted_program())
    client.await_ready(WAIT_S)
    with pytest.raises(ProcessLost, match="^the process that decoded it gave no right answer$"):
        client.prepare(source, name="it", timeout_s=WAIT_S)


def test_a_long_refusal_is_cut(make: Callable[..., PictureClient]) -> None:
    client = make(*scripted_program())
    client.await_ready(WAIT_S)
    with pytest.raises(PictureError) as caught:
        client.prepare("refuse 5000", name="it", timeout_s=WAIT_S)
    assert len(str(caught.value)) == 1000


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("signal 9", "the process that decoded it was ended by signal 9"),
        ("signal 11", "the process that decoded it was ended by signal 11"),
        ("exit 3", "the process that decoded it ended with exit code 3"),
        ("sleep 60", "decoding it took longer than 0.3 s and was given up"),
        ("signal 19", "decoding it took longer than 0.3 s and was given up"),
    ],
)
def test_what_became_of_the_process_is_told(source: str, cause: str, make: Callable[..., PictureClient]) -> None:
    client = make(*scripted_program())
    client.await_ready(WAIT_S)
    with pytest.raises(ProcessLost, match=f"^{cause}$"):
        client.prepare(source, name="it", timeout_s=0.3 if "0.3" in cause else WAIT_S)
    assert client.is_alive() == ("0.3" in cause)


def test_whoever_waits_is_told_when_the_process_is_ended_from_another_thread(
    make: Callable[..., PictureClient],
) -> None:
    client = make(*scripted_program())
    client.await_ready(WAIT_S)
    timer = threading.Timer(0.1, client.abort)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ProcessLost):
        client.prepare("sleep 60", name="it", timeout_s=WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2
    timer.join()


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        (scripted_program(setup="os._exit(7)"), "a picture process ended with exit code 7 before it was ready"),
        (scripted_program(setup="os.kill(os.getpid(), 6)"), "process was ended by signal 6 before it was ready"),
        (scripted_program(setup="time.sleep(60)"), "a picture process was not ready after 2 s"),
        (scripted_program(first='messages.Broken("no file")'), "a picture process cannot serve: no file"),
        (scripted_program(first='messages.Refused("x")'), "a picture process began with Refused"),
    ],
)
def test_a_start_that_fails_is_told(program: tuple[str, ...], cause: str, make: Callable[..., PictureClient]) -> None:
    client = make(*program)
    with pytest.raises(RuntimeError, match=cause):
        client.await_ready(2.0 if "after 2 s" in cause else WAIT_S)
