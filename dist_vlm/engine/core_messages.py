"""What the front and a core in a process of its own send each other, and how it is written.

A message is one byte that names its class, then the class as `workers/wire.py` writes it: msgpack with a closed schema.
Nothing is unpickled on either side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from dist_vlm.engine.messages import EngineImage, EngineOutput, EngineRequest
from dist_vlm.engine.state import EngineState
from dist_vlm.executor.base import ExecutorInfo, StageKind
from dist_vlm.sched.request import FinishReason
from dist_vlm.workers import wire
from dist_vlm.workers.plan import ImageSpan, SamplingRow, TokenLogprobs

_KINDS = ("coded_pixels", "pixel_values", "image_features")
_FINISH_REASONS = ("stop", "length", "abort", "error", None)
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "uint8": np.dtype("u1")}


@dataclass(frozen=True, slots=True)
class Configure:
    """The front's first message. fields: a resolved configuration's flat fields, as JSON."""

    fields: str


@dataclass(frozen=True, slots=True)
class Image:
    """An `EngineImage`. data: the array's bytes in C order, little-endian."""

    span: ImageSpan
    kind: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Add:
    """An `EngineRequest`. stop_token_ids: ascending."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    images: tuple[Image, ...]
    sampling: SamplingRow
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    priority: int
    cache_salt: str
    output_token_ids: tuple[int, ...]
    num_prompt_logprobs: int


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class AskState:
    """Asks for `State`, which comes after the step under way."""


@dataclass(frozen=True, slots=True)
class AskSilence:
    """Asks for `Silence`, which comes at once."""


@dataclass(frozen=True, slots=True)
class Started:
    """The core's first message, if its ranks started."""

    info: ExecutorInfo


@dataclass(frozen=True, slots=True)
class Failure:
    """An `ExecutorError`; as the core's first message a `StartError`, or a `ValueError` where the stage is empty."""

    stage: str
    cause: str
    rank: int | None


class Output(NamedTuple):
    """An `EngineOutput`, its stop_reason in two parts."""

    request_id: str
    new_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None
    stop_token: int | None
    stop_cause: str | None
    first_scheduled_time: float | None
    num_preemptions: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """News of requests, in the order of their steps."""

    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class State:
    state: EngineState


@dataclass(frozen=True, slots=True)
class Silence:
    """seconds: since each rank was last heard, in rank order."""

    seconds: tuple[float, ...]


Message = Configure | Add | Abort | AskState | AskSilence | Started | Failure | Outputs | State | Silence

_CLASSES: tuple[type[Any], ...] = (
    Configure, Add, Abort, AskState, AskSilence, Started, Failure, Outputs, State, Silence,
)  # fmt: skip
_TAGS = {cls: bytes([tag]) for tag, cls in enumerate(_CLASSES)}


def pack(message: Message) -> bytes:
    return _TAGS[type(message)] + wire.encode(message)


def unpack(frame: bytes) -> Message:
    """Raises `WireError` on anything but a message."""
    if not frame or frame[0] >= len(_CLASSES):
        raise wire.WireError(f"a message of unknown class {frame[:1].hex()!r}")
    return cast(Message, wire.decode(_CLASSES[frame[0]], frame[1:]))


def add_message(request: EngineRequest) -> Add:
    return Add(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        images=tuple(_image_message(image) for image in request.images),
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        stop_token_ids=tuple(sorted(request.stop_token_ids)),
        priority=request.priority,
        cache_salt=request.cache_salt,
        output_token_ids=request.output_token_ids,
        num_prompt_logprobs=request.num_prompt_logprobs,
    )


def request_of(message: Add) -> EngineRequest:
    """Raises `WireError` where an image's parts do not fit each other."""
    return EngineRequest(
        request_id=message.request_id,
        prompt_token_ids=message.prompt_token_ids,
        images=tuple(_image_of(image) for image in message.images),
        sampling=message.sampling,
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        priority=message.priority,
        cache_salt=message.cache_salt,
        output_token_ids=message.output_token_ids,
        num_prompt_logprobs=message.num_prompt_logprobs,
    )


def output_message(output: EngineOutput) -> Output:
    reason = output.stop_reason
    return Output(
        request_id=output.request_id,
        new_token_ids=output.new_token_ids,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        finish_reason=output.finish_reason,
        stop_token=reason if isinstance(reason, int) else None,
        stop_cause=reason if isinstance(reason, str) else None,
        first_scheduled_time=output.first_scheduled_time,
        num_preemptions=output.num_preemptions,
        num_cached_tokens=output.num_cached_tokens,
    )


def output_of(message: Output) -> EngineOutput:
    """Raises `WireError` for an unknown finish reason."""
    if message.finish_reason not in _FINISH_REASONS:
        raise wire.WireError(f"finish_reason {message.finish_reason!r}")
    return EngineOutput(
        request_id=message.request_id,
        new_token_ids=message.new_token_ids,
        logprobs=message.logprobs,
        prompt_logprobs=message.prompt_logprobs,
        finish_reason=cast(FinishReason | None, message.finish_reason),
        stop_reason=message.stop_token if message.stop_token is not None else message.stop_cause,
        first_scheduled_time=message.first_scheduled_time,
        num_preemptions=message.num_preemptions,
        num_cached_tokens=message.num_cached_tokens,
    )


def _image_message(image: EngineImage) -> Image:
    array = image.array
    dtype = _DTYPES[array.dtype.name]
    return Image(image.span, image.kind, array.dtype.name, array.shape, array.astype(dtype, copy=False).tobytes())


def _image_of(message: Image) -> EngineImage:
    """The array is read-only: it is the message's own memory."""
    dtype = _DTYPES.get(message.dtype)
    fits = message.kind in _KINDS and (message.dtype == "uint8") == (message.kind == "coded_pixels")
    if dtype is None or not fits:
        raise wire.WireError(f"an image of kind {message.kind!r} and dtype {message.dtype!r}")
    if min(message.shape, default=0) < 1 or math.prod(message.shape) * dtype.itemsize != len(message.data):
        raise wire.WireError(f"an image of shape {message.shape} in {len(message.data)} bytes")
    array = np.frombuffer(message.data, dtype).reshape(message.shape)
    return EngineImage(message.span, cast(StageKind, message.kind), array)
