"""The transports by the names a configuration gives them."""

from __future__ import annotations

from dist_vlm.executor.direct_transport import DirectTransport
from dist_vlm.executor.transport import GraphTransport

TRANSPORTS: dict[str, type[GraphTransport] | type[DirectTransport]] = {"ray": GraphTransport, "direct": DirectTransport}
