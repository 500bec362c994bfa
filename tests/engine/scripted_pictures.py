"""A picture process that does what the pictures say: it starts at once, and knows no picture."""

from __future__ import annotations

SHAPE = (1, 3, 56, 56)

# {setup} runs before the first message, {first} is sent as the answer to it.
_PROGRAM = """
import array, contextlib, os, signal, socket, sys, time
from dist_vlm.engine import picture_messages as messages
{setup}
channel = messages.PictureChannel(socket.socket(fileno=int(sys.argv[1])))
with contextlib.suppress(ConnectionError):
    channel.receive()
    channel.send({first})
    while True:
        picture = channel.receive()
        source = bytearray(picture.size)
        channel.receive_into(memoryview(source))
        command, _, number = source.decode().partition(" ")
        if command == "signal":
            os.kill(os.getpid(), int(number))
        elif command == "exit":
            os._exit(int(number))
        elif command == "sleep":
            time.sleep(float(number))
        elif command == "refuse":
            channel.send(messages.Refused(picture.name + ": refused" + "!" * int(number or 0)))
            continue
        key = number if command == "key" else "0" * 32
        shape = (1, 3, int(number), 56) if command == "shape" else (1, 3, 56, 56)
        values = array.array("f", [float(number) if command == "value" else 0.0]) * (3 * 56 * 56)
        kind = source.decode() if command == "kind" else "pixel_values"
        answer = messages.Prepared(key, kind, shape, 0.25, 0.5, 80, 60)
        channel.send(messages.Ready() if command == "babble" else answer, memoryview(values).cast("B"))
"""


def scripted_program(*, setup: str = "", first: str = "messages.Ready()") -> tuple[str, ...]:
    """What the interpreter is given. A picture is a command and a number: "signal 9" (to itself), "exit 3", "sleep 1",
    "refuse", "key ...", "kind ...", "shape 7", "babble"; "value 5" and whatever else are answered, all pixels 5 or 0.
    """
    return ("-P", "-c", _PROGRAM.format(setup=setup, first=first))
