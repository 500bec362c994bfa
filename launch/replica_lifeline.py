"""What binds a server and its replicas: an actor of the server's own, which dies with the server's process.

Serve keeps an application until somebody deletes it, and with it the GPUs. So the replicas wait for the anchor's end,
however it comes, and then have Serve delete the application. It is also where a command from outside is left for the
server.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import suppress
from typing import Any

NAMESPACE = "dist_vlm"

# Each replica waits for the anchor's end, and the server for a command.
_MOST_WAITING = 1000
_PAUSE_S = 1.0

_log = logging.getLogger(__name__)


class Anchor:
    def __init__(self) -> None:
        self._asked = asyncio.Event()

    async def for_ever(self) -> None:
        await asyncio.Event().wait()

    async def ask_restart(self) -> None:
        self._asked.set()

    async def next_restart(self) -> None:
        """Waits until the replicas are to be replaced."""
        await self._asked.wait()
        self._asked.clear()


class Lifeline:
    """The server's end. Goes to the replicas as an argument, which `watch` it.

    app_name: the application. Raises `ValueError` where a server of that name is in the cluster.
    """

    def __init__(self, app_name: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._app_name = app_name
        make_remote: Any = ray.remote
        # On the server's own machine: another may go, and the server stays.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = make_remote(num_cpus=0, max_concurrency=_MOST_WAITING, scheduling_strategy=here)(Anchor)
        self.anchor = actor.options(name=app_name, namespace=NAMESPACE).remote()

    def watch(self) -> None:
        """In a replica: begins to wait, in a thread."""
        threading.Thread(target=self._wait, name="lifeline", daemon=True).start()

    def _wait(self) -> None:
        import ray
        from ray import serve

        try:
            while self._is_there():
                with suppress(ray.exceptions.RayActorError):
                    ray.get(self.anchor.for_ever.remote())
                time.sleep(_PAUSE_S)
            _log.error("the server is gone; its application %s is deleted", self._app_name)
            serve.delete(self._app_name, _blocking=False)
        except Exception as error:  # this replica's own end
            _log.debug("the lifeline ended with %s", type(error).__name__)

    def _is_there(self) -> bool:
        """By Ray's own books: a replica that was cut off for a moment has lost nobody."""
        import ray

        try:
            ray.get_actor(self._app_name, namespace=NAMESPACE)
        except ValueError:
            return False
        return True
