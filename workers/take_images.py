"""A rank's end of the socket that images come through from a driver on its machine: a call names one and brings a
descriptor of memory that holds it, which is read and let go. The memory has no name, so nothing of it is ever left.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from dist_vlm.workers import wire
from dist_vlm.workers.failure import RankError, describe
from dist_vlm.workers.serve import Hello

# Of a call or an answer, at most; a cause longer than that is cut.
MESSAGE_BYTES = 1 << 13
_CAUSE_CHARACTERS = 1000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageCall:
    """Take an image, of which `shape` and `dtype` are told and a descriptor comes, or forget those with these keys."""

    key: str = ""
    kind: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    forget: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageAnswer:
    """cause: what went wrong, if anything did."""

    cause: str = ""


def take_images(
    stage: Callable[[str, str, np.ndarray], None], unstage: Callable[[str], None], *, rank: int, path: str, token: str
) -> None:
    """Connects to the driver's socket at `path` and answers each call in turn. Returns when the driver closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        connection.send(wire.encode(Hello(rank, token)))
        while True:
            try:
                message, descriptors = _receive(connection)
            except ConnectionResetError:
                return
            if not message:
                return
            try:
                call = wire.decode(ImageCall, message)
                work: list[Callable[[], None]] = [partial(unstage, key) for key in call.forget]
                if call.kind:
                    work.append(partial(_take, stage, call, descriptors))
                causes = [cause for cause in (_cause(one, rank) for one in work) if cause]
            except wire.WireError as error:
                causes = [describe(error)]
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            try:
                connection.send(wire.encode(ImageAnswer(causes[0][:_CAUSE_CHARACTERS] if causes else "")))
            except (BrokenPipeError, ConnectionResetError):
                return


def _take(stage: Callable[[str, str, np.ndarray], None], call: ImageCall, descriptors: list[int]) -> None:
    stage(call.key, call.kind, _read(descriptors, call))


def _cause(work: Callable[[], None], rank: int) -> str:
    """Does it, and tells what went wrong; nothing where nothing did."""
    try:
        work()
    except RankError as error:  # which is in the log
        return error.cause
    except Exception as error:
        _log.exception("rank %d: an image could not be taken or forgotten", rank)
        return describe(error)
    return ""


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it, which no process started meanwhile inherits: Python's own
    `recv_fds` does not pass its flags on in every version."""
    room = socket.CMSG_LEN(struct.calcsize("i"))
    message, told, _, _ = connection.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, data in told:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors += memoryview(data[: len(data) // 4 * 4]).cast("i").tolist()
    return message, descriptors


def _read(descriptors: list[int], call: ImageCall) -> np.ndarray:
    """The image in this process's own memory, not to be written to."""
    array = np.empty(call.shape, call.dtype)
    if array.nbytes and not descriptors:
        raise wire.WireError("no descriptor came with an image: this process may have no more")
    left, num_read = array.reshape(-1).view(np.uint8).data, 0
    # At a place told each time: other ranks read through the same description.
    while num_read < array.nbytes and (count := os.preadv(descriptors[0], [left[num_read:]], num_read)):
        num_read += count
    if num_read != array.nbytes:
        raise wire.WireError(f"{num_read} bytes of an image of {array.nbytes}")
    array.flags.writeable = False
    return array
