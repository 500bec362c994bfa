"""Pictures decoded and preprocessed in other processes: nothing of it runs in the server's, or can take it along."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import queue
import threading
import time
from concurrent.futures import Future

from dist_vlm.config import EngineConfig
from dist_vlm.engine import picture_messages as messages
from dist_vlm.engine.picture_client import PictureClient, PooledImage, ProcessLost
from dist_vlm.media import PictureError
from dist_vlm.media.picture_source import check_length
from dist_vlm.workers.failure import describe
from dist_vlm.workers.models import read_spec

__all__ = ["PicturePool", "PooledImage"]

_log = logging.getLogger(__name__)

_CLOSED = "the picture pool is closed"
_START_S = 60.0
_JOIN_S = 15.0
# So many starts in a row fail, with no process left, before pictures are refused instead of kept waiting.
_MAX_FAILED_STARTS = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class _Job:
    """A picture that waits. source: None once it is taken, or given up."""

    __slots__ = ("future", "name", "source")

    def __init__(self, source: str | bytes, name: str) -> None:
        self.source: str | bytes | None = source
        self.name = name
        self.future: Future[PooledImage] = Future()

    def take(self) -> str | bytes | None:
        """The source, for whom it is now; None if nobody waits for the picture any more."""
        source, self.source = self.source, None
        return source if self.future.set_running_or_notify_cancel() else None

    def fail(self, error: Exception) -> None:
        if self.take() is not None:
            self.future.set_exception(error)


class PicturePool:
    """Prepares pictures as `ImagePreparer` does, in processes of its own.

    A thread for each process gives it the next picture that waits and takes its answer. A process that ends, or takes
    too long, fails the picture that it had, and another is started in its place.

    config: resolved. num_workers: processes. memory_bytes: what decoding may take in each of them, beside the process
        itself. max_bytes: longest picture file. timeout_s: for one picture, once it is begun.
    Raises `ValueError` if the configuration has no use for pictures.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_workers: int,
        memory_bytes: int,
        max_bytes: int,
        timeout_s: float = 30.0,
    ) -> None:
        limits = (("num_workers", num_workers), ("memory_bytes", memory_bytes), ("max_bytes", max_bytes))
        for name, value in (*limits, ("timeout_s", timeout_s)):
            if value <= 0:
                raise ValueError(f"{name} = {value}: must be above 0")
        self._shape = _shape(config)
        self._configure = messages.Configure(json.dumps(config.fields()), memory_bytes, max_bytes)
        self._num_workers = num_workers
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        # Held while a process is spawned: none may be once the pool is closed.
        self._spawning = threading.Lock()
        self._clients: set[PictureClient] = set()
        # Of what follows; held for moments, since the event loop takes it too.
        self._lock = threading.Lock()
        self._num_up = 0
        self._num_restarts = 0
        self._num_failed_starts = 0
        self._refusal: str | None = "the picture pool is not started"

    @property
    def num_restarts(self) -> int:
        """Processes started in place of others that ended."""
        return self._num_restarts

    def start(self) -> None:
        """Starts the processes and waits for them. Raises `RuntimeError` with the cause if one does not come up; then
        none is left."""
        if self._threads or self._closing.is_set():
            raise RuntimeError("a picture pool is started once")
        end = time.monotonic() + _START_S
        clients: list[PictureClient] = []
        try:
            for _ in range(self._num_workers):
                clients.append(self._spawn())
            for client in clients:
                client.await_ready(max(end - time.monotonic(), 0.1))
            self._begin(clients)
        except BaseException:
            for client in clients:
                self._end(client)
            self.close()
            raise
        atexit.register(self.close)

    def _begin(self, clients: list[PictureClient]) -> None:
        with self._lock:
            if self._closing.is_set():
                raise RuntimeError(_CLOSED)
            self._num_up, self._refusal = len(clients), None
            for index, client in enumerate(clients):
                name = f"picture{index}"
                self._threads.append(threading.Thread(target=self._run, args=(client,), name=name, daemon=True))
                self._threads[-1].start()

    async def prepare(self, source: str | bytes, *, name: str) -> PooledImage:
        """source: a whole data: URL, or a picture file. name: what messages call the picture.

        Raises `PictureError`, whose text is safe to show, if this picture cannot be used, and `RuntimeError` if none
        can be: the pool is closed, or its processes do not start.
        """
        check_length(source, name=name, max_bytes=self._max_bytes)
        job = _Job(source, name)
        with self._lock:
            if self._refusal is not None:
                raise RuntimeError(self._refusal)
            self._jobs.put(job)
        try:
            return await asyncio.wrap_future(job.future)
        finally:
            # One that is given up holds no memory while it waits for its turn to be skipped.
            job.source = None
            del job  # an exception has this frame in its traceback, and the job has the exception

    def close(self) -> None:
        """Ends the processes; pictures that wait or are in work raise `RuntimeError`. Twice is once."""
        atexit.unregister(self.close)
        self._closing.set()
        with self._lock:
            self._refusal = _CLOSED
        with self._spawning:
            clients = list(self._clients)
        for client in clients:
            client.abort()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)
        self._refuse_waiting()

    # --------------------------------------------------------- a process's thread

    def _run(self, first: PictureClient) -> None:
        client: PictureClient | None = first
        while not self._closing.is_set():
            if client is None:
                client = self._restarted()
            elif not self._serve_next(client):
                self._end(client)
                client = None
                with self._lock:
                    self._num_up -= 1
        if client is not None:
            self._end(client)

    def _serve_next(self, client: PictureClient) -> bool:
        """Waits for a picture and has it prepared; False if the process is lost.

        Nothing of it outlives this call: not the array, and no exception with this frame in it.
        """
        job = self._jobs.get()
        if job is None:
            return True
        if not client.is_alive():  # it ended without a picture; this one is for another
            self._jobs.put(job)
            _log.warning("picture process %d has ended; another is started", client.pid)
            return False
        if (source := job.take()) is None:
            return True
        try:
            job.future.set_result(client.prepare(source, name=job.name, timeout_s=self._timeout_s))
        except PictureError as error:
            job.future.set_exception(PictureError(str(error)))
        except ProcessLost as error:
            job.future.set_exception(self._loss(job.name, client, str(error)))
            return False
        except Exception as error:
            _log.exception("the talk with picture process %d was broken off", client.pid)
            job.future.set_exception(RuntimeError(f"{job.name}: broken off by {type(error).__name__}"))
            return False
        return True

    def _loss(self, name: str, client: PictureClient, cause: str) -> Exception:
        if self._closing.is_set():
            return RuntimeError(_CLOSED)
        _log.warning("picture process %d, which had %s: %s; another is started", client.pid, name, cause)
        return PictureError(f"{name}: {cause}")

    def _restarted(self) -> PictureClient | None:
        """A process in place of one that ended; None, after a pause, if it does not start."""
        client: PictureClient | None = None
        try:
            client = self._spawn()
            client.await_ready(_START_S)
        except RuntimeError as error:
            if client is not None:
                self._end(client)
            self._pause_after(str(error))
            return None
        with self._lock:
            self._num_restarts += 1
            self._num_up += 1
            self._num_failed_starts = 0
            if not self._closing.is_set():
                self._refusal = None
        return client

    def _pause_after(self, cause: str) -> None:
        if self._closing.is_set():
            return
        _log.error("a picture process could not be started again: %s", cause)
        with self._lock:
            self._num_failed_starts += 1
            failed = self._num_failed_starts
            is_hopeless = self._num_up == 0 and failed >= _MAX_FAILED_STARTS
            if is_hopeless:
                self._refusal = f"pictures cannot be decoded: {cause}"
        if is_hopeless:
            self._refuse_waiting()
        self._closing.wait(min(_FIRST_PAUSE_S * 2 ** min(failed, 10), _LONGEST_PAUSE_S))

    # ------------------------------------------------------------------ any thread

    def _spawn(self) -> PictureClient:
        with self._spawning:
            if self._closing.is_set():
                raise RuntimeError(_CLOSED)
            try:
                client = PictureClient(self._configure, shape=self._shape)
            except OSError as error:
                raise RuntimeError(f"a picture process cannot be started ({describe(error)})") from None
            self._clients.add(client)
            return client

    def _end(self, client: PictureClient) -> None:
        with self._spawning:
            self._clients.discard(client)
        client.close()

    def _refuse_waiting(self) -> None:
        """Fails all pictures that wait; to be called once no more are let in."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.fail(RuntimeError(self._refusal))


def _shape(config: EngineConfig) -> tuple[int, ...]:
    """Of a prepared picture."""
    if config.vision.disable_image_processor:
        raise ValueError("disable_image_processor is set: there are no pictures to prepare, only preprocessed tensors")
    if config.vision.image_input_type == "image_features":
        raise ValueError("image_input_type = 'image_features': there are no pictures to prepare")
    shape = read_spec(config.model.model).image_input_shape
    if shape is None:
        raise ValueError("this model takes no images")
    return tuple(shape)
