import os
import socket
import threading

import numpy as np
import pytest

from dist_vlm.workers import wire
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.serve import Hello
from dist_vlm.workers.take_images import MESSAGE_BYTES, ImageAnswer, ImageCall, take_images


def link(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


class Rig:
    """The driver's end of a rank that keeps images, and takes none of the kind "bad"."""

    def __init__(self, connection):
        self.connection = connection
        self.held = {}

    def stage(self, key, kind, array):
        self.inherited = [
            name for name in os.listdir("/proc/self/fd") if "memfd:sent" in link(name) and os.get_inheritable(int(name))
        ]
        if kind == "bad":
            raise RankError(3, "stage", "ValueError: no " + "room" * 10_000)
        self.held[key] = (kind, array)

    def unstage(self, key):
        del self.held[key]

    def ask(self, message, data=None):
        descriptors = []
        if data is not None:
            descriptors.append(os.memfd_create("sent"))
            os.write(descriptors[0], data)
        socket.send_fds(self.connection, [message], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        return wire.decode(ImageAnswer, self.connection.recv(MESSAGE_BYTES)).cause


@pytest.fixture
def rig(tmp_path):
    path = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(1)
    made = Rig(None)
    arguments = {"rank": 3, "path": path, "token": "t"}
    thread = threading.Thread(target=take_images, args=(made.stage, made.unstage), kwargs=arguments)
    thread.start()
    made.connection, _ = listener.accept()
    assert wire.decode(Hello, made.connection.recv(MESSAGE_BYTES)) == Hello(3, "t")
    yield made
    made.connection.close()
    listener.close()
    thread.join(5)
    assert not thread.is_alive(), "it returns when the driver closes"


def open_descriptors():
    """Of what was sent: what a thread of another test opens meanwhile counts for nothing."""
    return sum("memfd:sent" in link(name) for name in os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_an_image_is_taken_and_forgotten(rig, dtype):
    array = np.random.default_rng(0).integers(0, 256, (1, 3, 50, 7)).astype(dtype)
    before = open_descriptors()
    assert rig.ask(wire.encode(ImageCall("a", "pixel_values", dtype, array.shape)), array.tobytes()) == ""
    kind, taken = rig.held["a"]
    assert kind == "pixel_values"
    assert taken.dtype == dtype
    assert not taken.flags.writeable
    np.testing.assert_array_equal(taken, array)
    assert open_descriptors() == before
    assert rig.inherited == [], "of what is read, no process that starts meanwhile has a part"
    assert rig.ask(wire.encode(ImageCall(forget=("a",)))) == ""
    assert rig.held == {}


@pytest.mark.parametrize(
    ("message", "data", "cause"),
    [
        (wire.encode(ImageCall("a", "bad", "uint8", (2,))), b"12", "ValueError: no room"),
        (wire.encode(ImageCall("a", "pixel_values", "uint8", (3,))), b"12", "WireError: 2 bytes of an image of 3"),
        (wire.encode(ImageCall("a", "pixel_values", "uint8", (3,))), None, "WireError: no descriptor came"),
        (wire.encode(ImageCall("a", "pixel_values", "no type", (3,))), b"123", "TypeError"),
        (wire.encode(ImageCall(forget=("a",))), None, "KeyError"),
        (b"nonsense", b"12", "WireError"),
    ],
)
def test_what_goes_wrong_is_answered_and_the_next_is_taken(rig, message, data, cause):
    before = open_descriptors()
    assert cause in rig.ask(message, data)
    assert rig.held == {}
    assert open_descriptors() == before
    assert rig.ask(wire.encode(ImageCall("b", "pixel_values", "uint8", (2,))), b"12") == ""
    assert list(rig.held) == ["b"]


def test_one_that_cannot_be_forgotten_keeps_none_of_the_others(rig):
    for key in ("a", "b"):
        assert rig.ask(wire.encode(ImageCall(key, "pixel_values", "uint8", (2,))), b"12") == ""
    assert "KeyError" in rig.ask(wire.encode(ImageCall(forget=("a", "unknown", "b"))))
    assert rig.held == {}
