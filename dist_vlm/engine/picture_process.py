"""A process that decodes and preprocesses pictures: what runs at the other end of a `PictureClient`'s socket.

    python -m dist_vlm.engine.picture_process DESCRIPTOR

DESCRIPTOR is the socket's. A picture may be made to exploit its decoder, so the process holds nothing but the image
processor, and takes limits on itself before it sees the first one. It ends when the pool closes the socket or dies.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress

from PIL import Image

from dist_vlm.config import EngineConfig
from dist_vlm.engine import picture_messages as messages
from dist_vlm.engine.images import ImagePreparer
from dist_vlm.engine.niceness import run_behind
from dist_vlm.media.picture import PictureError, PictureMemoryError
from dist_vlm.media.picture_source import open_data_url, open_file
from dist_vlm.workers import wire
from dist_vlm.workers.failure import describe
from dist_vlm.workers.models import get_family, read_spec

_log = logging.getLogger(__name__)

_NICENESS = 5
_MAX_OPEN_FILES = 32
_DRAIN_BYTES = 1 << 16
_PR_SET_NO_NEW_PRIVS = 38


class PictureProcess:
    """Serves one pool over one socket, one picture after the other."""

    def __init__(self, channel: messages.PictureChannel, configure: messages.Configure) -> None:
        config = EngineConfig.from_fields(**json.loads(configure.fields))
        spec = read_spec(config.model.model)
        processor = get_family(spec.family).image_processor(spec, config.vision.image_processor)
        self._channel = channel
        self._preparer = ImagePreparer(spec=spec, vision=config.vision, processor=processor)
        self._max_pixels = config.vision.max_image_pixels
        self._max_bytes = configure.max_bytes

    def serve_one(self) -> None:
        """Waits for a picture and answers."""
        message = self._channel.receive()
        if not isinstance(message, messages.Decode):
            raise wire.WireError(f"{type(message).__name__} from the pool")
        try:
            prepared, array = self._prepare(message)
        except (MemoryError, PictureMemoryError):
            text = f"{message.name}: decoding it needs more memory than media_worker_memory_mib allows"
        except PictureError as error:
            text = str(error)
        except Exception as error:
            _log.debug("%s cannot be preprocessed", message.name, exc_info=True)
            text = f"{message.name}: the picture cannot be preprocessed ({type(error).__name__})"
        else:
            self._channel.send(prepared, array)
            return
        # Out of the handlers, so that what the exception held is free again.
        self._channel.send(messages.Refused(text))

    def _prepare(self, message: messages.Decode) -> tuple[messages.Prepared, memoryview]:
        source = self._receive(message.size)
        began = time.perf_counter()
        picture = self._open(message, source)
        del source  # here and below: what is not needed any more makes room for the next step
        rgb = self._preparer.decoded(picture, message.name)
        del picture
        decoded = time.perf_counter()
        width, height = rgb.size
        image = self._preparer.preprocessed(rgb)
        done = time.perf_counter()
        array = image.array.astype(image.array.dtype.newbyteorder("<"), copy=False)
        times = decoded - began, done - decoded
        prepared = messages.Prepared(image.key, image.kind, array.shape, *times, width, height)
        return prepared, array.data.cast("B")

    def _receive(self, size: int) -> bytearray:
        try:
            data = bytearray(size)
        except MemoryError:
            part = memoryview(bytearray(_DRAIN_BYTES))
            for start in range(0, size, _DRAIN_BYTES):
                self._channel.receive_into(part[: size - start])
            raise
        self._channel.receive_into(memoryview(data))
        return data

    def _open(self, message: messages.Decode, source: bytearray) -> Image.Image:
        if message.is_url:
            return open_data_url(source, name=message.name, max_pixels=self._max_pixels, max_bytes=self._max_bytes)
        return open_file(bytes(source), name=message.name, max_pixels=self._max_pixels, max_bytes=self._max_bytes)


def confine(memory_bytes: int) -> None:
    """Limits this process for good: it may take `memory_bytes` more of memory, runs behind others, writes no files,
    starts nothing, and gains no rights."""
    run_behind(_NICENESS)
    limits = {
        resource.RLIMIT_AS: _address_space_bytes() + memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    if ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError("prctl refused PR_SET_NO_NEW_PRIVS")


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _configured(channel: messages.PictureChannel) -> PictureProcess:
    """Everything that is needed, loaded; then the limits."""
    configure = channel.receive()
    if not isinstance(configure, messages.Configure):
        raise wire.WireError(f"{type(configure).__name__} in place of Configure")
    Image.init()
    process = PictureProcess(channel, configure)
    confine(configure.memory_bytes)
    return process


def serve(channel: messages.PictureChannel) -> None:
    """From the pool's `Configure` until it leaves, when it raises `Disconnected`."""
    try:
        process = _configured(channel)
    except (ConnectionError, wire.WireError):
        raise
    except Exception as error:
        _log.exception("pictures cannot be served")
        channel.send(messages.Broken(describe(error)))
        return
    channel.send(messages.Ready())
    while True:
        process.serve_one()


def main() -> None:
    # transformers' image processors of the PIL backend do without torch, which would cost each process four times the
    # memory and the time to start: to them it is not installed.
    sys.modules["torch"] = None  # type: ignore[assignment]
    # Who ends a job sends it to every process of it; this one ends with its pool, whose requests are still finished.
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        connection.set_inheritable(False)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is the server's
        with suppress(ConnectionError):
            serve(messages.PictureChannel(connection))


if __name__ == "__main__":
    main()
