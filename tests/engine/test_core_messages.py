"""What crosses between front and core comes out as it went in, and nothing else is let in."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.messages import EngineImage, EngineOutput, EngineRequest
from dist_vlm.engine.state import EngineState
from dist_vlm.executor.base import ExecutorInfo
from dist_vlm.sched.scheduler import SchedulerStats
from dist_vlm.workers.config import LoadReport
from dist_vlm.workers.plan import ImageSpan, SamplingRow, TokenLogprobs
from dist_vlm.workers.wire import WireError

LOGPROBS = (TokenLogprobs(-0.5, 2, (7, 5), (-0.25, -0.5)),)
OUTPUT = EngineOutput(
    "a", (5, 6), LOGPROBS, LOGPROBS * 2, "stop", 7, first_scheduled_time=1.5, num_preemptions=3, num_cached_tokens=16
)


def request() -> EngineRequest:
    pixels = np.random.default_rng(0).standard_normal((1, 3, 5, 7)).astype(np.float32)
    features = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(1, 3, 4))
    images = (
        EngineImage(ImageSpan("x", 1, 3), "pixel_values", pixels),
        EngineImage(ImageSpan("y", 6, 3), "image_features", features),
        EngineImage(ImageSpan("z", 9, 3), "coded_pixels", np.arange(60, dtype=np.uint8).reshape(1, 3, 4, 5)),
    )
    row = SamplingRow(temperature=0.5, seed=2**63 - 1, logit_bias=((3, -1.5),), bad_words=((1, 2), (3,)), logprobs=0)
    return EngineRequest(
        "a",
        (1, 2, 2**31),
        images,
        row,
        9,
        frozenset({9, 2, 5}),
        priority=-3,
        cache_salt="tenant",
        output_token_ids=(4, 2**31),
        num_prompt_logprobs=3,
    )


def cross(message: messages.Message) -> Any:
    return messages.unpack(messages.pack(message))


def assert_no_field_is_at_its_default(value: Any) -> None:
    """Otherwise a field added later could be lost on the way and this test would not notice."""
    defaults = value._field_defaults if isinstance(value, EngineOutput) else _defaults(type(value))
    for name, default in defaults.items():
        assert getattr(value, name) != default, name


def _defaults(cls: type[Any]) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def test_a_request_crosses_whole() -> None:
    sent = request()
    assert_no_field_is_at_its_default(sent)
    came = messages.request_of(cross(messages.add_message(sent)))
    for field in dataclasses.fields(EngineRequest):
        if field.name != "images":
            assert getattr(came, field.name) == getattr(sent, field.name), field.name
    for image, original in zip(came.images, sent.images, strict=True):
        assert (image.span, image.kind) == (original.span, original.kind)
        np.testing.assert_array_equal(image.array, original.array, strict=True)


@pytest.mark.parametrize("stop_reason", [7, 0, "step failed (rank 1): gone", "", None])
def test_an_output_crosses_whole(stop_reason: int | str | None) -> None:
    assert_no_field_is_at_its_default(OUTPUT)
    sent = [OUTPUT._replace(stop_reason=stop_reason), EngineOutput("b")]
    came = cross(messages.Outputs(tuple(messages.output_message(one) for one in sent)))
    assert [messages.output_of(one) for one in came.outputs] == sent


def test_what_a_start_and_the_engines_state_tell_crosses() -> None:
    report = LoadReport(1, 2, 3, 4, 5, 6, 7, {"op": "torch"}, 8)
    stats = SchedulerStats(*range(1, 1 + len(dataclasses.fields(SchedulerStats))))
    state = EngineState(stats, *range(101, 100 + len(dataclasses.fields(EngineState))))
    for message in (
        messages.Configure('{"model": "m"}'),
        messages.Abort("a"),
        messages.AskState(),
        messages.AskSilence(),
        messages.Started(ExecutorInfo(64, (report, report), {"ray": 1.5, "load": 2.0})),
        messages.Failure("load", "no such file", 1),
        messages.Failure("", "the KV cache holds 12 tokens", None),
        messages.State(state),
        messages.State(dataclasses.replace(state, feature_row_capacity=None)),
        messages.Silence((0.0, 1.5, 2e9)),
        messages.Silence(()),
    ):
        assert cross(message) == message


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff",
        b"\x01",
        messages.pack(messages.Abort("a"))[:-1],
        messages.pack(messages.Abort("a")) + b"\0",
        b"\x00" + messages.pack(messages.AskState())[1:],
        b"\x00" + pickle.dumps(messages.Configure("{}")),
    ],
)
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        messages.unpack(frame)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "object"}, "dtype 'object'"),
        ({"kind": "pickle"}, "kind 'pickle'"),
        ({"kind": "coded_pixels"}, "kind 'coded_pixels' and dtype 'float32'"),
        ({"dtype": "uint8"}, "kind 'pixel_values' and dtype 'uint8'"),
        ({"shape": (1, 3, 5, 8)}, "in 420 bytes"),
        ({"shape": (-1, 3, 5, -7)}, "in 420 bytes"),
        ({"shape": ()}, "in 420 bytes"),
        ({"data": b""}, "in 0 bytes"),
    ],
)
def test_an_image_whose_parts_do_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    add = messages.add_message(request())
    spoilt = dataclasses.replace(add, images=(dataclasses.replace(add.images[0], **change),))
    with pytest.raises(WireError, match=text):
        messages.request_of(cross(spoilt))


def test_an_unknown_finish_reason_is_refused() -> None:
    spoilt = messages.output_message(OUTPUT)._replace(finish_reason="bored")
    with pytest.raises(WireError, match="'bored'"):
        messages.output_of(spoilt)
