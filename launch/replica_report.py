"""What replicas tell of themselves, about once a second, through Ray Serve: how it is written, and where it arrives.

Serve hands it to the routers of each process, and copies a router's module by value. So what the routers share with the
rest of their process is here, in a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.state import EngineState


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """silence: seconds since each rank was heard, when the replica told."""

    replica_id: str
    state: EngineState
    silence: tuple[float, ...]


def written(state: EngineState, silence: tuple[float, ...]) -> dict[str, Any]:
    return {"state": messages.pack(messages.State(state)), "silence": messages.pack(messages.Silence(silence))}


def read(replica_id: str, stats: Mapping[str, Any]) -> ReplicaReport | None:
    """None where the replica has told nothing yet. Raises `WireError` for what is no report."""
    if "state" not in stats:
        return None
    state, silence = messages.unpack(stats["state"]), messages.unpack(stats["silence"])
    assert isinstance(state, messages.State) and isinstance(silence, messages.Silence)
    return ReplicaReport(replica_id, state.state, silence.seconds)


_sources: dict[str, Callable[[], list[ReplicaReport]]] = {}


def arrive_at(app_name: str, source: Callable[[], list[ReplicaReport]]) -> None:
    """source: gives the latest reports of an application's replicas that run; called from any thread."""
    _sources[app_name] = source


def latest_of(app_name: str) -> list[ReplicaReport]:
    """Empty before this process's first handle of the application was used."""
    source = _sources.get(app_name)
    return [] if source is None else source()
