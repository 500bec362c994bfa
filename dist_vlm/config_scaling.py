"""The section `scaling` of a configuration: how the replicas of a served model are kept. Their number is
`parallel.replicas`."""

from __future__ import annotations

from dataclasses import dataclass

from dist_vlm.config_fields import check_section, option


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Read by `dist-vlm serve` alone, and only where there may be more than one replica."""

    app_name: str = option("str", "dist-vlm", help="name of the replicas' application in Ray Serve")
    max_replicas: int | None = option(
        "int", None, help="most replicas, as many as the load asks for (none: parallel.replicas, a fixed number)", low=1
    )
    target_requests_per_replica: int | None = option(
        "int", None, help="requests on a replica from which on another is started (none: max_num_seqs)", low=1
    )
    upscale_delay_s: float = option("float", 30.0, help="seconds of load before a replica is added", low=0)
    downscale_delay_s: float = option("float", 600.0, help="seconds of little load before a replica is ended", low=0)
    replica_health_period_s: float = option("float", 2.0, help="seconds between checks of a replica's ranks", above=0)
    replica_health_timeout_s: float = option(
        "float", 30.0, help="seconds a replica's rank may be silent before the replica is replaced", above=0
    )
    replica_drain_timeout_s: float = option(
        "float",
        60.0,
        help="seconds a replica that is to end has for its requests; what is left goes on in another",
        above=0,
    )

    def __post_init__(self) -> None:
        check_section(self, "scaling")
