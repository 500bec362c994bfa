"""How plans reach all ranks and answers come back. Nothing outside this file knows of compiled graphs."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dist_vlm.executor.errors import rank_error
from dist_vlm.workers.failure import RankError

# A buffer grows to the largest message it has carried; this is where it begins.
_BUFFER_BYTES = 1 << 20
_GRAPH_LOGGER = "ray.dag.compiled_dag_node"


class TransportClosedError(RuntimeError):
    """The transport was closed, or a rank at its other end is gone."""


class TransportTimeoutError(RuntimeError):
    """Not every rank answered in time. The transport cannot be used any further."""


class Transport(ABC):
    """Carries messages to every rank, in order, and one answer for each message back.

    `send` and `receive` belong to one thread; `close` may be called from any, and ends a `receive` under way.
    """

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Hands a message to every rank. At most `depth` messages may be unanswered. Raises `TransportClosedError`."""

    @abstractmethod
    def receive(self, timeout_s: float) -> list[bytes]:
        """The answers, in rank order, to the oldest unanswered message.

        Raises `RankError` as soon as one rank's step raised it, `TransportTimeoutError`, or `TransportClosedError`.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the loops on the ranks. The ranks must be idle or dead: a stuck one is killed first."""


def _carry_no_tensors(_: Any) -> None:
    """Runs on a rank. Plans are bytes, but a rank that Ray gave a GPU would enter that GPU's context for each, by its
    place in CUDA_VISIBLE_DEVICES, which Ray is asked to leave unset; it fails there and the graph's loop ends."""
    from ray.experimental.channel.accelerator_context import register_accelerator_context
    from ray.experimental.channel.cpu_communicator import CPUCommunicator

    register_accelerator_context("cpu", CPUCommunicator)


class GraphTransport(Transport):
    """A Ray compiled graph over the actors' `step`: one shared-memory buffer to all ranks, one back from each."""

    def __init__(self, actors: Sequence[Any], *, depth: int, send_timeout_s: float) -> None:
        import ray
        from ray.dag import InputNode, MultiOutputNode

        ray.get([actor.__ray_call__.remote(_carry_no_tensors) for actor in actors], timeout=send_timeout_s)
        self._depth = depth
        self._unanswered: deque[list[Any]] = deque()
        self._closing = threading.Lock()
        self._closed = False
        # Its thread reports every death of a rank with a traceback; the executor reports it in one line.
        logging.getLogger(_GRAPH_LOGGER).setLevel(logging.CRITICAL)
        with InputNode() as plan:
            outputs = MultiOutputNode([actor.step.bind(plan) for actor in actors])
        self._graph = outputs.experimental_compile(
            _submit_timeout=send_timeout_s,
            _buffer_size_bytes=_BUFFER_BYTES,
            _max_inflight_executions=depth,
        )
        # Closing a channel registers its reader, and Ray aborts this process if the writer is dead by then: a rank
        # that died before its first answer was read would take the driver with it. So they are registered here.
        for channel in self._graph.dag_output_channels:
            channel.ensure_registered_as_reader()

    def send(self, message: bytes) -> None:
        import ray

        if len(self._unanswered) >= self._depth:
            raise RuntimeError(f"{self._depth} messages are unanswered already")
        try:
            self._unanswered.append(self._graph.execute(message))
        except ray.exceptions.RayChannelTimeoutError:
            raise TransportTimeoutError("the ranks did not take a plan in time") from None
        except (ray.exceptions.RayError, OSError) as error:
            raise TransportClosedError(type(error).__name__) from None

    def receive(self, timeout_s: float) -> list[bytes]:
        import ray

        if not self._unanswered:
            raise RuntimeError("receive() with no message unanswered")
        # A read that times out loses the answers it had got: there is no second try, and no polling.
        try:
            answers: list[bytes] = ray.get(self._unanswered.popleft(), timeout=timeout_s)
        except RankError as error:
            raise (rank_error(error) or error) from None
        except (ray.exceptions.RayChannelTimeoutError, ray.exceptions.GetTimeoutError):
            raise TransportTimeoutError(f"no answer in {timeout_s:g} s") from None
        except ray.exceptions.RayError as error:
            raise TransportClosedError(type(error).__name__) from None
        return answers

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        with suppress(Exception):
            self._graph.teardown()
