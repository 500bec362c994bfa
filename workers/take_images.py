"""A rank's end of the socket that images come through from a driver on its machine: a call names one and brings a
descriptor of memory that holds it, which is read and let go. The memory has no name, so nothing of it is ever left.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

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
    """Take an image, of which `shape` and `dtype` are told and a descriptor comes; without a kind: forget it."""

    key: str
    kind: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()


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
                message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                return
            if not message:
                return
            cause = ""
            try:
                call = wire.decode(ImageCall, message)
                if call.kind:
                    stage(call.key, call.kind, _read(descriptors, call))
                else:
                    unstage(call.key)
            except RankError as error:  # which is in the log
                cause = error.cause
            except Exception as error:
                _log.exception("rank %d: an image could not be read", rank)
                cause = describe(error)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            try:
                connection.send(wire.encode(ImageAnswer(cause[:_CAUSE_CHARACTERS])))
            except (BrokenPipeError, ConnectionResetError):
                return


def _read(descriptors: list[int], call: ImageCall) -> np.ndarray:
    """The image in this process's own memory, not to be written to."""
    array = np.empty(call.shape, call.dtype)
    # At a place told each time: other ranks read through the same description.
    num_read = os.preadv(descriptors[0], [array.reshape(-1).view(np.uint8).data], 0) if array.nbytes else 0
    if num_read != array.nbytes:
        raise wire.WireError(f"{num_read} bytes of an image of {array.nbytes}")
    array.flags.writeable = False
    return array
